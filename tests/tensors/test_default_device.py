"""A default device of torch reaches data that the user makes, never the structure: lengths and offsets stay on the CPU."""

import pytest
import torch
from tensors.oracle import laws
from tensors.oracle.samples import load

from danling.tensors import NestedTensor, supported_ops

OPS = {name for name, path in ((name, path) for name, _, path in supported_ops()) if path != "refused"}
OWN_TENSORS = {"_transformer_encoder_layer_fwd", "addbmm", "baddbmm", "index_put", "index_select"}
"""Their samples make a tensor in the call, which then lies on the default device."""


def runs_on_elements(sample, batches):
    """Whether the sample itself makes nothing on the default device."""
    if sample.reference is not None:
        return False
    try:
        rows = zip(*(batch.elements for batch in batches), strict=True)
        results = [sample.call(laws.translate_element, *row) for row in rows]
    except Exception:
        return False
    return not any(tensor.is_meta for tensor in laws.tensors_in(results))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["sequences", "two_ragged", "empty_element"])
def test_ops_work_under_another_default_device(layout):
    # The meta device holds no data, so whatever is made there by mistake shows at once.
    checked = 0
    for name, samples in sorted(load().items()):
        for sample in samples:
            if name not in OPS - OWN_TENSORS or layout not in sample.layouts or torch.float32 not in sample.dtypes:
                continue
            batches = laws.make(sample, layout, torch.float32)
            with torch.device("meta"):
                if not runs_on_elements(sample, batches):
                    continue
                nested = [batch.nested() for batch in batches]
                results = laws.tensors_in(sample.call(laws.translate_for(nested[0]), *nested))
            for result in results:
                assert not result.is_meta, name
                if isinstance(result, NestedTensor):
                    segments = result.structure.segments
                    assert not segments.sizes.is_meta and not segments.offsets.is_meta, name
            checked += 1
    assert checked > 300


def test_construction_takes_the_default_device_for_numbers_as_torch_does():
    with torch.device("meta"):
        x = NestedTensor([[1.0, 2.0], [3.0]])
        assert x.is_meta and x.structure.segments.lengths == [2, 1] and x.tensor.shape == (2, 2)
        assert NestedTensor.from_lengths(torch.ones(3, 2), [2, 1]).is_meta
