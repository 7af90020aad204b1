"""Data on its way to the model: `sources` open a data set by name and read one record at a time, `transforms` decode,
crop, flip and scale images, and `pipeline` turns a source into endless shuffled batches, each of them a pure function
of the seed and its number, read ahead of time and sent to the device ahead of need.
"""
