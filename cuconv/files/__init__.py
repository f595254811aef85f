"""Formats of files that hold models and weights, one module each.

A format tells where the file keeps each weight of a layer, as `Stored` arrays under the layer's own names; what to do
with them is the business of `cuconv.weights`. Whatever a file says about itself is compared with the layer and with the
file's size before memory is taken. No format runs code: there is no pickle, and a config names classes from a closed
list.
"""
