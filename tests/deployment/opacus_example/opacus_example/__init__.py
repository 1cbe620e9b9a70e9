"""What Flower's example for Opacus does, with the network, records and steps of our own run."""
