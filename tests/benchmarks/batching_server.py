"""The fake server of verify's tests, which also answers several prompts in one request, as vLLM does."""

from typing import Any

from ..verify.fake_server import FakeServer, Reply


class BatchingServer(FakeServer):
    """One choice for each prompt, in their order. ``batches`` counts such requests."""

    batches = 0

    async def _complete(self, path: str, body: dict[str, Any]) -> Reply:
        prompts = body["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            return await super()._complete(path, body)
        self.batches += 1
        choices: list[Any] = []
        for index, prompt in enumerate(prompts):
            status, reply = await super()._complete(path, {**body, "prompt": prompt})
            if status != 200 or isinstance(reply, str):
                return status, reply
            choices += [choice | {"index": index} for choice in reply["choices"]]
        return 200, {"choices": choices}
