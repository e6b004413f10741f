"""Why a file that torch or safetensors should read can't be read, in our words: torch's own advise to switch off what
keeps a file from running code."""

import re


def why_unreadable(error: Exception) -> str:
    """A clause for the error of torch.load, or of safetensors."""
    said = str(error).strip()
    if named := re.search(r"GLOBAL ([\w.]+)", said):
        return f"beside tensors it holds objects of {named[1]}, which can't be read without running code from the file"
    if "weights_only" in said or "Weights only" in said:
        return "it isn't a file that torch.save wrote"
    if re.search("PytorchStreamReader|unexpected EOF|deserializing header", said):
        return "it is damaged or cut off"
    if isinstance(error, EOFError) and not said:
        return "it is empty, or ends too soon"
    return said.splitlines()[0] if said else type(error).__name__
