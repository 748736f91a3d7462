"""What a request says, as what the network reads."""
