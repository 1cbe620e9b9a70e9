"""Programs that stand in for Flower's own, and what they need without importing anything large."""
