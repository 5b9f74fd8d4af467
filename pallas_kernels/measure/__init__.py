"""What kernels cost: timed here, or by the compiler of a chip that is not there."""
