"""What an adapted model is worth for what it cost: rows, heads and weights chosen in every way, one matrix of arms."""
