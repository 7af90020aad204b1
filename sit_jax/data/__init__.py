"""Data on its way to the codec.

`sources` open a data set by name and read one record at a time. `transforms` decode, crop and
mirror images. `pipeline` turns a source into endless shuffled batches, each a pure function of the
seed and its number, read ahead and sent to the devices before they are needed.
"""
