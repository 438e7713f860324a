"""Backend `reference`: every op in plain PyTorch; `backend.py` lists its functions."""
