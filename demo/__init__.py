"""
The demo world: a grammar of small stories, a language model that has learned it, a sparse autoencoder
that reads the model, and preference pairs with a gold reward. Everything is made from seeds, so the whole
pipeline can be run, and alignment measured, in minutes on a CPU and without a download.
"""
