"""How the result of a solve enters autograd: vjps and jvps, closure conversion, `torch.func`, autocast."""
