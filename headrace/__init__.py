"""What applications import, and the contract all parts share."""
