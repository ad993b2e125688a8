"""The conformance suite: what every engine below `TorchRunner` has to show, with real processes."""
