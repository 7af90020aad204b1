"""Data on its way to the codec.

`sources` opens a data set by name; `source` says what one is, and `digits` and `folder` are those
there are. `transforms` decode, crop and mirror images. `subset` draws a part of a data set.
`pipeline` turns a source into endless shuffled batches, each a pure function of the seed and its
number. `readers` read them ahead, in threads or processes. `statistics` are the mean and spread of
channels. `fetch` copies stored latents to a local disk.
"""
