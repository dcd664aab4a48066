"""How fast the kernels are: every form of every operation, beside the time the hardware needs."""
