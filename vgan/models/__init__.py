"""Generators, the discriminator and the layers they are made of. Constructors take plain arguments."""
