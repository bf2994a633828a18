from pathlib import Path

import httpx
import openai

from tests.server.live import KEY, Live


def attach(url):
    http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
    return Live(
        url,
        "ouro-mini",
        Path("/tmp/ouro-dev/srv.log"),
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0),
        http,
    )
