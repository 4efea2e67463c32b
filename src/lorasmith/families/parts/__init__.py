"""Parts that several families share: text encoders, autoencoders, UNets, in their namings."""
