"""Engines that run the real client and server on one machine, the command line, and experiments."""
