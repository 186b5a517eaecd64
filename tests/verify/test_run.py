from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

from .fake_server import FakeServer


async def test_clean():
    s = FakeServer()
    r = await verify(Settings(base_url="http://fake", num_prompts=100, mixed_prompts=30), transport=s.transport())
    print(r.message, r.notes)
    for a in r.arms:
        print(
            a.name,
            a.status,
            a.planned,
            a.answered,
            a.compared,
            a.unique_outputs,
            a.unique_logprobs,
            a.distinct_requests,
            a.duration_s,
            a.phases,
        )
    assert r.status == "identical"
