"""Reading a JSON object from a file."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is no UTF-8 text, holds no JSON, nests it too deeply, or holds another value than an
            object; the message is the reason without the path.
        OSError: the file cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is no JSON that can be read: its nesting is too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} instead of a JSON object")
    return found
