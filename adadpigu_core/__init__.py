"""The AdaDPIGU algorithm: differentially private training with importance masks and adaptive clipping.

Nothing in this package knows about Flower, reads a clock, or touches a global random generator.
"""

__version__ = "0.1.0"
