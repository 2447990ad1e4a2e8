"""What commands print on a terminal: progress bars and errors."""
