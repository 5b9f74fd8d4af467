"""What a compiled step costs on a chip that is not there."""
