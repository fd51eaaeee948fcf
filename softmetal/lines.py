def find(path: str, pc: int) -> str:
    return ""
