"""What can go wrong, as a tree.

    AdaDPIGUError
    ├── ConfigurationError    a setting is unknown, ill-typed or out of range
    ├── DataError             records cannot be read or do not fit the task
    ├── ModelError            a model cannot be trained with per-record privacy
    ├── MessageError          a message is malformed, of another version or out of order
    ├── LedgerError           the ledger cannot be trusted or written: stop
    ├── BudgetError           the privacy budget does not allow what was asked
    ├── PolicyError           the owner of a node does not allow what was asked
    └── FederationError       a run cannot go on

Every error carries a ``code``, a short word from a fixed list. A client sends the code to the server and keeps
the text in its own log, because a text may describe records. ``public_message`` is text that may travel: it is
empty unless whoever raised the error vouches that it holds public facts only.
"""


class AdaDPIGUError(Exception):
    """Base of all errors raised by this package.

    Args:
        message: What is wrong and what to do, for the person on this machine.
        public_message: The part that may be sent to other machines. Must not depend on records.
    """

    code = "error"

    def __init__(self, message: str, public_message: str = "") -> None:
        super().__init__(message)
        self.public_message = public_message


class ConfigurationError(AdaDPIGUError):
    """A setting is unknown, ill-typed or out of range."""

    code = "configuration"


class DataError(AdaDPIGUError):
    """Records cannot be read, or do not fit the task."""

    code = "data"


class ModelError(AdaDPIGUError):
    """A model cannot be trained with per-record privacy."""

    code = "model"


class MessageError(AdaDPIGUError):
    """A message is malformed, speaks another protocol version, or comes out of order."""

    code = "message"


class LedgerError(AdaDPIGUError):
    """The ledger cannot be read, trusted or written."""

    code = "ledger"


class BudgetError(AdaDPIGUError):
    """The privacy budget does not allow what was asked."""

    code = "budget"


class PolicyError(AdaDPIGUError):
    """The policy of a node does not allow what was asked."""

    code = "policy"


class FederationError(AdaDPIGUError):
    """A run cannot go on, for instance because no client takes part."""

    code = "federation"
