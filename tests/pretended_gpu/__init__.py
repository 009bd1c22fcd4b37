"""Training as a GPU would see it, on a machine that has none.

PyTorch is told that there is a GPU (``device.cpp``), tensors on it are fake ones of PyTorch (:mod:`.gpu`), and the code
of the package takes every path that asks for the device. What that shows: tensors that are on the wrong device; shapes
and dtypes that do not fit; what the host would have to wait for, transfers in both directions among it; which operators
are launched. What it cannot show: whether a kernel exists, what it computes, how fast it is, how much memory it takes.
Attention is computed operator by operator, and trials that compare numbers (whether a model takes packed rows) only
run, and are then taken to have passed.

The library has to be there before PyTorch, so :mod:`.runs` is a process of its own.
"""
