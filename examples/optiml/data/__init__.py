"""From files on disk to tensors: the index of a data set, its pixels, its label subsets. Knows nothing of networks."""
