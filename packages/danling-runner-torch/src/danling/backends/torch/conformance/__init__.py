"""The conformance suite: what an engine has to show before it claims a guarantee.

    pytest --pyargs danling.backends.torch.conformance --stack toy --nproc 2

trains the model of `task.Task` with the engine named by `--stack`, in `--nproc` processes of their own, and compares it,
update by update, with a plain loop in one process; then it skips, stops, kills, resumes and damages runs. A test belongs
to one of the numbered guarantees; those of guarantees that the engine's class does not claim are skipped by number.

| option | means |
|---|---|
| `--stack NAME` | the engine; `torch` without it |
| `--nproc N` | processes; 2 without it |
| `--set KEY=VALUE` | a configuration key for every run, repeatable: `--set parallel.axes.shard=2` |
| `--dtype NAME` | of the model, instead of what the class says |
| `--tolerance X` | largest relative difference from the reference, likewise |

A class says what its arithmetic allows in a mapping: `conformance = {"dtype": "float32", "tolerance": 1e-5, "bf16": 3e-2}`;
what it leaves out is in `settings.DEFAULTS`. Needs pytest 8.2 or newer.
"""
