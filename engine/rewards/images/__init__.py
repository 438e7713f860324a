"""Image rewards by name: detectors, preference models, questions and text in drawings, of transformers' classes."""
