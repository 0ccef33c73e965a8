"""What a saved BLR model says about itself, and what its files must hold."""
