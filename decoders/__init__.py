"""
What turns frozen patches into an answer for every pixel: one decoder a file, chosen by --decoder. A task knows none of
them, and a decoder no task. Each is a module with

    stride(side)                windows of this side lie so far apart
    windows(image, side)        what it wants the network to see of an image -> views; those of frozen.maps
    Head(width, n_out)          a head, for parameters from a file;  width
    fit(kind, maps, truths, n_out, loss_of, c, device)    -> a head; kind: segmentation, depth
    peak(kind, c)               the learning rate that it took
    head.predict(views)         maps of an image's views -> n_out h w each, for sliding.slide to put together
"""

from decoders import linear

DECODERS = dict(linear=linear)
