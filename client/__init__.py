"""The Flower client: it owns the records, the ledger and every decision about privacy."""
