"""Samples of recurrent cells and networks."""

import copy
from functools import lru_cache

import torch
from tensors.oracle.sample import Sample
from torch import nn

FP32 = (torch.float32,)
torch.manual_seed(0)
NETS = {
    "lstm": nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True),
    "gru": nn.GRU(4, 3, batch_first=True),
    "rnn_tanh": nn.RNN(4, 3, 2, batch_first=True),
    "rnn_relu": nn.RNN(4, 3, batch_first=True, nonlinearity="relu", bidirectional=True),
}
CELLS = {"lstm_cell": nn.LSTMCell(4, 4), "gru_cell": nn.GRUCell(4, 4), "rnn_tanh_cell": nn.RNNCell(4, 4)}
CELLS["rnn_relu_cell"] = nn.RNNCell(4, 4, nonlinearity="relu")


@lru_cache
def twin(net, dtype):
    return copy.deepcopy(net).to(dtype)


def in_dtype(net, x):
    return net if x.dtype == torch.float32 else twin(net, x.dtype)


def run(net):
    def call(d, x):
        return in_dtype(net, x)(x)[0]

    return call


def step(cell):
    def call(d, x, h):
        module = in_dtype(cell, x)
        params = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        func = {"LSTMCell": torch.lstm_cell, "GRUCell": torch.gru_cell}.get(type(cell).__name__)
        if func is None:
            func = torch.rnn_tanh_cell if cell.nonlinearity == "tanh" else torch.rnn_relu_cell
        return func(x, (h, h * 0.5), *params) if func is torch.lstm_cell else func(x, h, *params)

    return call


SAMPLES = {
    **{
        name: [Sample(run(net), layouts=("sequences", "single", "equal", "empty_element"), dtypes=FP32)]
        for name, net in NETS.items()
    },
    **{
        name: [Sample(step(cell), ("normal", "normal"), ("sequences", "single", "equal", "empty_batch"), FP32)]
        for name, cell in CELLS.items()
    },
}
