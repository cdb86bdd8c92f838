"""Slow, obvious versions of fast functions: what a fast one must equal."""

# ---------------------------------------------------------------- tokens


def slow_decode_escaped(data):
    """The codes in one image's escaped bytes, one by one; None where it is no image."""
    codes = []
    position = 0
    while position < len(data):
        code = data[position]
        if code == 255:
            position += 1
            if position == len(data) or data[position] == 255:
                return None
            code += data[position]
        codes.append(code)
        position += 1
    return codes


def slow_decode_uint16(data):
    """The codes in one image's 16-bit codes; None where it is no image."""
    if len(data) % 2:
        return None
    return [data[i] + 256 * data[i + 1] for i in range(0, len(data), 2)]


SLOW_DECODERS = {'escaped-bytes': slow_decode_escaped, 'uint16-le': slow_decode_uint16}


def slow_nearest_codes(codebook, top_k):
    """For each row of a codebook, the other rows by falling cosine; equal ones by rising code."""
    rows = codebook.double().tolist()
    norms = [sum(x * x for x in row) ** 0.5 for row in rows]
    result = []
    for code, row in enumerate(rows):
        cosines = [sum(a * b for a, b in zip(row, other)) / (norms[code] * norms[i]) for i, other in enumerate(rows)]
        others = [i for i in range(len(rows)) if i != code]
        result.append(sorted(others, key=lambda i: -cosines[i])[:top_k])
    return result
