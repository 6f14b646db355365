"""A client that only counts the chunks of streams, with so little work that the server is the bottleneck."""

import asyncio
import json
from urllib.parse import urlsplit

from bench.load import LoadFailed

LIMIT_S = 120.0


async def take_streams(url: str, model: str, num_streams: int, num_tokens: int) -> None:
    """Opens `num_streams` streams at once and reads each to its end.

    Raises:
        LoadFailed: a stream broke off, or had fewer chunks than tokens.
    """
    async with asyncio.timeout(LIMIT_S):
        counts = await asyncio.gather(*(_count(url, model, num_tokens) for _ in range(num_streams)))
    if min(counts) < num_tokens:
        raise LoadFailed(f"a stream of {num_tokens} tokens had {min(counts)} chunks")


async def _count(url: str, model: str, num_tokens: int) -> int:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(_request(address.netloc, model, num_tokens))
        count, end = 0, b""
        while b"[DONE]" not in end:
            piece = await reader.read(1 << 16)
            if not piece:
                raise LoadFailed(f"a stream broke off: {end[-200:].decode(errors='replace')}")
            # A `"content"` that is split between two pieces is counted once, with the second piece.
            end = end[-len(b'"content"') + 1 :] + piece
            count += end.count(b'"content"')
        return count
    finally:
        writer.close()


def _request(host: str, model: str, num_tokens: int) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "river"}],
            "stream": True,
            "max_tokens": num_tokens,
            "temperature": 0,
        }
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
