"""The sum over ranks of arrays on the device: one copy to the host, one all-reduce, one back."""

import sys
from types import SimpleNamespace

import numpy as np

from minilora import tree
from minilora.backend import namespace, to_device, to_host
from minilora.training.ranks import MPIRanks

IN_PLACE = object()


class TwoAlike:
    """A communicator of two ranks that hold the same."""

    def __init__(self):
        self.sizes = []

    def Allreduce(self, source, buffer):  # noqa: N802
        assert source is IN_PLACE
        assert type(buffer) is np.ndarray
        self.sizes.append(buffer.size)
        buffer += buffer


def test_arrays_of_the_device_go_through_the_host_as_one(device, copied, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(IN_PLACE=IN_PLACE))
    )
    ranks = object.__new__(MPIRanks)
    ranks.comm = TwoAlike()
    host = [
        np.float32(1.5),
        {"A": np.arange(6, dtype=np.float32).reshape(2, 3), "B": np.ones(4, np.float32)},
    ]
    arrays = to_device(host, device)
    before = copied()
    total = ranks.sum(arrays)
    assert ranks.comm.sizes == [11]
    assert copied().to_host - before.to_host == copied().to_device - before.to_device == 1
    for name, leaf in tree.flatten(host).items():
        summed = tree.flatten(total)[name]
        assert namespace(summed) is namespace(arrays[1]["A"])
        np.testing.assert_array_equal(to_host(summed), 2 * leaf, err_msg=name)
        np.testing.assert_array_equal(to_host(tree.flatten(arrays)[name]), leaf, err_msg=name)
