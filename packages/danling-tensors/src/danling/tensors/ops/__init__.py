"""The op layer: every torch function that knows NestedTensors, one rule each.

How a rule is found
    `NestedTensor.__torch_function__` looks the called function up in `table.TABLE`. On a miss `table.resolve` derives the
    canonical name (methods, in-place forms `name_`, operators, aten overloads, `torch.special.*` twins, `*_copy` and
    `unsafe_*` forms and the aliases of `table.ALIASES` all lead to one name), finds the rule in `table.RULES` and binds it.
    What has no rule runs per element (`fallback.per_element`).

How a rule is written
    A rule is a function `rule(func, *args, **kwargs)`. `func` is the very function that was called, in whatever form, so a
    rule calls `func` on values instead of naming torch functions. It works above autograd: written with torch operations
    on `values_of(x)` and `danling.tensors.kernels`, it is differentiable by construction.

        from danling.tensors.ops.base import like, values_of
        from danling.tensors.ops.table import register

        @register("unary", "relu", "sigmoid")                   # family, canonical names; path="packed" by default
        def unary(func, x):
            return like(x, func(values_of(x)))                  # same layout object, padding_value and mask_value

    Canonical names are torch's: `relu`, `linalg_det`, `fft_fft`, `special_erf`; `F.embedding` for a function of
    `torch.nn.functional` whose arguments differ from `torch.embedding` (it is tried first for functions of that module).
    A name the installed torch lacks is skipped. `path` is one of `table.PATHS`; `per element` and `padded` rules warn once
    and raise under `strict()` by themselves, before the rule runs.

    - `values_of(x)` gives `(R, *static)` in the graph; `x._layout` the `Layout`: `ragged_dims`, `static_dims` (element
      dims), `static_sizes`, `rows`, `segments`. Never read `x._values` where gradients matter.
    - Dims: `layout.element_dim(dim)` turns a dim of `.shape` into an element dim, `None` for the batch;
      `layout.values_dim(d)` is where a static element dim lies in values.
    - New layouts: `layout.with_static(sizes)`, `layout.with_dims(ragged_dims, static_sizes)`, `layout.replace(...)`,
      `Layout.from_lengths(...)`. Layouts are carried, never inferred from sizes.
    - Index tensors on a device: `layout.segments.on("offsets" | "lengths" | "sizes" | "element" | "row" | ("coord", j),
      device)`, built once. Python ints: `segments.lengths`, `segments.bounds`, `segments.table`.
    - Operands of mixed structure: `broadcast.align(operands, name)` gives a common layout and values for each.
    - Grouped rules (equal sizes run as one dense call): `grouped.run_grouped`.
    - Errors: `base.batch_error(func, dim)`; `with base.at_element(i):` names the element in what torch raises.
    - A result without ragged dims left is a dense tensor `(B, ...)`.

    One family per file; importing danling.tensors imports every file of this folder, so no list needs an entry.

How samples for the oracle test are declared
    `tests/tensors/oracle/samples/<family>.py` holds `SAMPLES`, a dict from canonical name to a list of `Sample`s; see
    `tests/tensors/oracle/sample.py`. The suite fails for an op of `supported_ops()` without a sample.
"""
