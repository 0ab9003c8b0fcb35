"""`resprune bench`: what a bundle takes on this device, at several budgets."""
