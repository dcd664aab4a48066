"""How fast kernels and whole models are: every form of every operation, compared with the time that
the hardware needs. Sparse methods run as models run them, through the engine of ratplus_exp.
"""
