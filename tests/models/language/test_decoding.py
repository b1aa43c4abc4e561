"""Our decoding against transformers' ``generate`` on LAVIS's own class: the same weights, token for token."""

from itertools import product

import pytest
import torch
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM

from lavis_kvmod.models.language.decoding import Search, decode
from lavis_kvmod.models.language.opt import FrozenOPT
from lavis_kvmod.models.language.recorded import Recordings

PAD, STOP, QUERIES, WIDTH, NEW = 1, 7, 5, 32, 8
TEXTS = [[2], [2, 9, 11, 30], [2, 11, 9]]  # BOS, and prompts of several lengths: padded on the left


@pytest.fixture(scope="module")
def prompts():
    """Soft prompts (b, q, width), token ids and mask (b, t) of four texts."""
    texts = [*TEXTS, TEXTS[1]]
    longest = max(map(len, texts))
    ids = torch.tensor([[PAD] * (longest - len(text)) + text for text in texts])
    soft_prompt = torch.randn(len(texts), QUERIES, WIDTH, generator=torch.Generator().manual_seed(1))
    return soft_prompt, ids, (ids != PAD).long()


@pytest.fixture(scope="module")
def both(prompts):
    """LAVIS's OPT and ours with the same weights, of which many texts end early."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=60,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        init_std=0.15,
    )
    stock, ours = OPTForCausalLM(config).eval(), FrozenOPT(config)
    begun = of_transformers(stock, prompts, Search(NEW))
    with torch.no_grad():  # where the first text has its fourth token, a text now rather ends
        stock.lm_head.weight[STOP] = 1.1 * stock.lm_head.weight[begun[0][3]]
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def of_transformers(opt, prompts, search):
    """New tokens up to the stop token, as transformers gives them."""
    soft_prompt, ids, mask = prompts
    generated = opt.generate(
        input_ids=ids,
        attention_mask=torch.cat([mask.new_ones(len(ids), QUERIES), mask], dim=1),
        query_embeds=soft_prompt.repeat_interleave(search.copies, dim=0),  # which 4.26 does not repeat itself
        eos_token_id=STOP,
        pad_token_id=PAD,
        do_sample=search.sample,
        **{name: value for name, value in search._asdict().items() if name != "sample"},
    )
    rows = generated[:, ids.shape[1] :].tolist()
    return [row[: row.index(STOP) + 1] if STOP in row else row for row in rows]


def of_ours(opt, prompts, search):
    soft_prompt, ids, mask = prompts
    embedded = torch.cat([soft_prompt, opt.get_input_embeddings()(ids)], dim=1)
    full = torch.cat([mask.new_ones(len(ids), QUERIES), mask], dim=1)
    return decode(opt, embedded, full, ids, search, stop=STOP, pad=PAD)


SETTINGS = list(product((0, 5), (-1.0, 0.0, 1.5), (1.0, 1.3)))  # fewest tokens, length penalty, repetition penalty


@pytest.mark.parametrize("num_beams", [1, 2, 3, 5])
@pytest.mark.parametrize("new", [1, NEW])
def test_tokens_are_those_of_transformers(both, prompts, num_beams, new):
    """Texts of several lengths, some of which end early; one of each, or all beams'."""
    stock, ours = both
    ended = set()
    for i, (least, length_penalty, repetition_penalty) in enumerate(SETTINGS if new > 1 else SETTINGS[:4]):
        count = num_beams if i % 2 else 1
        search = Search(new, num_beams, min(least, new), length_penalty, repetition_penalty, count)
        got = [text.ids for text in of_ours(ours, prompts, search)]
        assert got == of_transformers(stock, prompts, search), search
        ended.update(text[-1] == STOP for text in got)
    assert new < NEW or ended == {True, False}


@pytest.mark.parametrize(
    "top_p, temperature, penalty", [(0.9, 1.0, 1.0), (0.5, 1.7, 1.3), (1.0, 0.7, 1.0), (1e-4, 1.0, 1.0)]
)
def test_what_is_drawn_is_what_transformers_draws(both, prompts, top_p, temperature, penalty):
    stock, ours = both
    search = Search(
        NEW, sample=True, top_p=top_p, temperature=temperature, num_return_sequences=3, repetition_penalty=penalty
    )
    torch.manual_seed(4)
    expected = of_transformers(stock, prompts, search)
    torch.manual_seed(4)
    got = [text.ids for text in of_ours(ours, prompts, search)]
    assert got == expected and len(got) == 3 * len(prompts[1])


@pytest.mark.parametrize("search", [Search(NEW), Search(NEW, 4, num_return_sequences=3), Search(NEW, sample=True)])
def test_log_probabilities_are_those_of_the_whole_text(both, prompts, search):
    """Of the model itself, whatever is penalised; each sequence run at once."""
    _, ours = both
    soft_prompt, ids, mask = prompts
    search = search._replace(repetition_penalty=1.2, min_new_tokens=2, length_penalty=2.0)
    for i, text in enumerate(of_ours(ours, prompts, search)):
        row = i // (search.num_return_sequences)
        context = ids[row][mask[row].bool()].tolist()
        embedded = ours.get_input_embeddings()(torch.tensor([context + text.ids]))
        inputs = torch.cat([soft_prompt[row : row + 1], embedded], dim=1)
        with torch.no_grad():
            hidden = ours.model.decoder(inputs_embeds=inputs).last_hidden_state[0, -len(text.ids) - 1 : -1]
            each = ours.lm_head(hidden).log_softmax(-1)[range(len(text.ids)), text.ids]
        assert text.log_prob == pytest.approx(each.sum().item(), abs=1e-4)


def test_a_beginning_goes_through_once_and_then_one_position_a_step(both, prompts):
    _, ours = both
    shapes = []
    hook = ours.model.decoder.layers[0].register_forward_hook(
        lambda _, args, out: shapes.append(tuple(args[0].shape[:2]))
    )
    of_ours(ours, prompts, Search(4, num_beams=3, min_new_tokens=4))
    hook.remove()
    b, t = prompts[1].shape
    assert shapes == [(b, QUERIES + t)] + [(3 * b, 1)] * 3


def test_other_texts_in_the_batch_change_nothing(both, prompts):
    """But for padding, which a length penalty counts."""
    _, ours = both
    for search in (Search(NEW), Search(NEW, 3, length_penalty=0.0)):
        together = of_ours(ours, prompts, search)
        for i, text in enumerate(together):
            alone = [part[i : i + 1] for part in prompts]
            assert of_ours(ours, alone, search)[0].ids == text.ids


@pytest.mark.parametrize(
    "search, message",
    [
        (Search(NEW, num_return_sequences=2), "at most as many texts as beams, of which there are 1; got 2"),
        (Search(NEW, 2, num_return_sequences=3), "at most as many texts as beams, of which there are 2; got 3"),
        (Search(0), "at least one new token"),
        (Search(NEW, 0), "at least one new token, beam and text"),
        (Search(NEW, temperature=0), "temperature, repetition_penalty and top_p above 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(both, prompts, search, message):
    with pytest.raises(ValueError, match=message):
        of_ours(both[1], prompts, search)


def test_weights_are_used_as_they_are_stored(both, prompts):
    """An autocast around it changes nothing: no weight is converted at a step."""
    _, ours = both
    search, dtypes = Search(6, 2), set()
    plain = of_ours(ours, prompts, search)
    hook = ours.model.decoder.layers[0].fc1.register_forward_hook(lambda _, args, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert of_ours(ours, prompts, search) == plain
    hook.remove()
    assert dtypes == {torch.float32}


RECORDED = [
    Search(NEW, num_beams=3, num_return_sequences=2, min_new_tokens=2, length_penalty=-1.0),
    Search(NEW, num_beams=2, repetition_penalty=1.3),
    Search(NEW),
    Search(1, num_beams=3),
    Search(NEW, sample=True, top_p=0.9, num_return_sequences=2),
]


def assert_same_texts(found, expected):
    assert [text.ids for text in found] == [text.ids for text in expected]
    assert [text.log_prob for text in found] == pytest.approx([text.log_prob for text in expected], abs=1e-5)


def test_steps_of_one_shape_give_the_same_texts(both, prompts):
    """What a CUDA graph would replay, run as it is: memory that was used before, and other numbers of rows."""
    ours, shapes = both[1], []
    fewer = tuple(part[1:3] for part in prompts)
    for search in [*RECORDED, *RECORDED]:
        for batch in (prompts, fewer):
            torch.manual_seed(3)
            expected = of_ours(ours, batch, search)
            ours.recordings = recordings = Recordings(record=lambda step: shapes.append(step.logits.shape) or step)
            for _ in range(2):  # the second time in memory that is full
                torch.manual_seed(3)
                assert_same_texts(of_ours(ours, batch, search), expected)
            assert ours.recordings is recordings
            ours.recordings = None
    assert len(shapes) == 2 * 2 * (len(RECORDED) - 1)  # once each; the search for one token needs no step


def test_few_recordings_are_kept(both, prompts):
    ours, made = both[1], []
    ours.recordings = Recordings(record=lambda step: made.append(step) or step)
    for beams in (1, 2, 1, 3, 1, 2):
        of_ours(ours, prompts, Search(NEW, num_beams=beams))
    ours.recordings = None
    assert [len(step.tokens) for step in made] == [4, 8, 12, 8]  # that of 8 rows had made room for 12


def test_where_nothing_can_be_recorded_a_line_says_so(both, prompts, caplog):
    def fails(step):
        raise RuntimeError("CUDA error: out of memory\nand more")

    ours, search = both[1], Search(NEW, num_beams=2)
    expected = of_ours(ours, prompts, search)
    ours.recordings = Recordings(record=fails)
    assert_same_texts(of_ours(ours, prompts, search), expected)
    assert ours.recordings is None
    assert [record.getMessage() for record in caplog.records] == [
        "decoding goes on without CUDA graphs: CUDA error: out of memory"
    ]
