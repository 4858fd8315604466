"""What methods ask of clients besides their weights."""
