"""The demo's frozen parts: what they see, what they know, and that they are built whole or not at all."""

import json
import random
import threading
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from lavis.models.eva_vit import VisionTransformer
from lavis.processors.blip_processors import BlipImageEvalProcessor
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from lavis_kvmod.demo import described_language, digits, easy_language, parts, vision
from lavis_kvmod.demo.colour_vision import (
    ColourVisionRecipe,
    build_colour_vision_encoder,
    train_colour_vision_encoder,
)
from lavis_kvmod.demo.described_language import DescribedLanguageRecipe
from lavis_kvmod.demo.language import LanguageRecipe, accuracy, save_bpe
from lavis_kvmod.demo.vision import VisionRecipe
from lavis_kvmod.models.language.opt import language_model_weights, opt_config

TINY = parts.Recipe(
    vision=VisionRecipe(embed_dim=16, depth=1, num_heads=2, steps=2, batch_size=4),
    language=LanguageRecipe(hidden_size=16, num_layers=1, num_heads=2, ffn_dim=16, steps=2, batch_size=4),
)


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVIS_KVMOD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a real build at small size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVIS_KVMOD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield parts.build_parts(TINY)


@pytest.fixture()
def builds(monkeypatch):
    """Replaces the language model's training by writing two files; the list grows with each build."""
    made = []

    def train(recipe, folder):
        made.append(folder)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "merges.txt").write_text("m", encoding="utf-8")
        return 1.0

    monkeypatch.setattr(parts, "train_language_model", train)
    return made


# ---------------------------------------------------------------- image encoder


def images(scan):
    """The scan in every ink and paper, as BLIP's processor gives it: (24, 3, 56, 56)."""
    processor = BlipImageEvalProcessor(56)
    pairs = product(digits.INKS, digits.PAPERS)
    return torch.stack([processor(digits.render(replace(scan, ink=i, paper=p))) for i, p in pairs])


def test_the_vit_cannot_see_colour():
    image = images(digits.load_scans("val")[0])
    grey = vision.LuminanceVisionTransformer.luminance(image)
    assert image.std(0).mean() > 0.5
    assert grey.shape == image.shape
    assert (grey - grey[0]).abs().max() <= 1.01 / 255 / 0.2 + 1e-5  # one 8-bit level, standardised
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])


def test_tokens_of_one_scan_hardly_differ_by_colour():
    torch.manual_seed(0)
    encoder = vision.build_vision_encoder(embed_dim=16, depth=1, num_heads=2).eval()
    scans = digits.load_scans("val")[:2]
    with torch.no_grad():
        one, other = (encoder(images(scan)) for scan in scans)
    assert one.shape == (24, 17, 16)
    assert one.std(0).mean() < 0.05 * (one.mean(0) - other.mean(0)).abs().mean()


def test_a_grey_picture_is_seen_in_training_as_a_coloured_one_is_in_use():
    scan = replace(digits.load_scans("val")[0], shift=0.0)
    ink = torch.from_numpy(digits.coverage(scan))[None, None]
    trained_on = vision.LuminanceVisionTransformer.luminance(vision._grey(ink))
    in_use = vision.LuminanceVisionTransformer.luminance(images(scan))
    assert (in_use - trained_on).abs().max() < 4 / 255 / 0.2  # grain and rounding
    assert (in_use.mean((1, 2, 3)) - trained_on.mean()).abs().max() < 0.2 / 255 / 0.2


def test_the_vits_keys_are_those_of_lavis():
    stock = VisionTransformer(img_size=56, patch_size=14, embed_dim=128, depth=4, num_heads=4, qkv_bias=True)
    ours = vision.build_vision_encoder()
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in stock.state_dict().items()}
    assert not list(ours.buffers())
    assert all(m.eps == 1e-6 for m in ours.modules() if isinstance(m, nn.LayerNorm))


def test_every_entry_of_the_vit_goes_through_the_luminance_step():
    torch.manual_seed(0)
    encoder = vision.build_vision_encoder(embed_dim=16, depth=2, num_heads=2).eval()
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens = encoder(image)
        assert torch.equal(encoder.forward_features(image), tokens)
        assert torch.equal(encoder.get_intermediate_layers(image)[-1], tokens)


def test_the_vit_of_a_dose_sees_colour_once_it_has_been_shown_some(tmp_path):
    image = images(digits.load_scans("val")[0])
    spread = {}
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        recipe = ColourVisionRecipe(embed_dim=16, depth=1, num_heads=2, steps=4, batch_size=8, colour_share=share)
        state, _ = train_colour_vision_encoder(recipe)
        of_vit = {key[len("visual_encoder.") :]: value for key, value in state.items() if key.startswith("visual")}
        encoder = build_colour_vision_encoder(embed_dim=16, depth=1, num_heads=2)
        encoder.load_state_dict(of_vit)
        with torch.no_grad():
            spread[share] = encoder.eval()(image).std(0).mean()
        assert bool(of_vit["patch_embed.proj.weight"][:, 1:].any()) == (share > 0)
    assert spread[0.0] < 0.3 * spread[0.5]


def test_the_file_holds_vit_and_ln_vision_and_nothing_else(tiny):
    state = load_file(tiny / "vision" / "vision.safetensors")
    expected = nn.ModuleDict(
        {
            "visual_encoder": vision.build_vision_encoder(embed_dim=16, depth=1, num_heads=2),
            "ln_vision": LayerNorm(16),
        }
    )
    expected.load_state_dict(state)


def test_augmentation_moves_ink_but_keeps_it():
    torch.manual_seed(0)
    ink, labels = vision._coverage_and_digits(digits.load_scans("val"), 56)
    moved = vision._moved(ink)
    assert ink.shape == moved.shape == (144, 1, 56, 56) and labels.shape == (144,)
    assert 0 <= moved.min() and moved.max() <= 1
    assert (moved - ink).abs().mean() > 0.02
    assert 0.8 < moved.sum() / ink.sum() < 1.2


# ---------------------------------------------------------------- language model


def test_the_tokenizer_is_like_opts(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny / "language"), use_fast=False)
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>", "<pad>")
    assert len(tokenizer("\n", add_special_tokens=False).input_ids) == 1

    prompt = "Question: which digit is written? Short answer:"
    ids = tokenizer(prompt).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    answer = tokenizer(" seven\n", add_special_tokens=False).input_ids
    assert tokenizer(prompt + " seven\n").input_ids == ids + answer  # no token spans the prompt's end
    assert len(answer) == 2
    odd = "Grüße, 日本?"
    assert tokenizer.decode(tokenizer(odd, add_special_tokens=False).input_ids) == odd


def test_the_language_model_loads_as_hugging_face_does(tiny):
    model = OPTForCausalLM.from_pretrained(str(tiny / "language"))
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 2)
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0, 0, 0)
    assert config.max_position_embeddings == 128
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    saved = load_file(tiny / "language" / "model.safetensors")
    for key, value in model.state_dict().items():
        assert key == "lm_head.weight" or torch.equal(value, saved[key])


# ---------------------------------------------------------------- building and keeping


def test_a_build_leaves_two_complete_folders_and_nothing_else(tiny):
    assert sorted(p.name for p in tiny.iterdir() if p.suffix != ".lock") == ["language", "vision"]
    for part in ("language", "vision"):
        manifest = json.loads((tiny / part / "manifest.json").read_text(encoding="utf-8"))
        assert set(manifest["sha256"]) == {p.name for p in (tiny / part).iterdir()} - {"manifest.json"}
        assert all(0 <= value <= 1 for value in manifest["measured"].values())


def test_what_is_in_the_cache_is_not_built_again(cache, builds):
    first = parts.language_model(TINY)
    assert parts.language_model(TINY) == first and first.is_dir()
    assert len(builds) == 1


def test_another_recipe_has_another_folder(cache):
    other = replace(TINY, language=replace(TINY.language, steps=3))
    assert parts.parts_dir(TINY).parent == cache
    assert len({parts.parts_dir(recipe) for recipe in (TINY, other, parts.DEMO)}) == 3


def test_the_same_recipe_gives_the_same_weights(cache, tiny):
    torch.manual_seed(123)
    again = parts.vision_weights(TINY)
    for key, value in load_file(tiny / "vision" / "vision.safetensors").items():
        assert torch.equal(value, load_file(again)[key])


@pytest.mark.parametrize("build", [parts.vision_weights, parts.language_model])
def test_a_build_leaves_the_callers_generators_alone(cache, build):
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    build(TINY)
    after = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert torch.equal(after[0], torch.rand(3))
    assert after[1:] == (random.random(), np.random.rand())


def test_a_build_works_where_gradients_are_off(cache):
    with torch.no_grad():
        assert parts.vision_weights(TINY).is_file()
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing_half_made(cache, monkeypatch, builds, error):
    whole = parts.train_language_model

    def interrupted(recipe, folder):
        whole(recipe, folder)
        raise error

    monkeypatch.setattr(parts, "train_language_model", interrupted)
    with pytest.raises(error):
        parts.language_model(TINY)
    assert [p.name for p in parts.parts_dir(TINY).iterdir() if p.is_dir()] == []

    monkeypatch.setattr(parts, "train_language_model", whole)
    assert (parts.language_model(TINY) / "config.json").is_file()


def test_what_a_killed_build_left_is_removed(cache, builds):
    leftover = parts.parts_dir(TINY) / "language.partial-killed"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{", encoding="utf-8")
    parts.language_model(TINY)
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "manifest"])
def test_a_damaged_part_is_built_anew_with_a_warning(cache, builds, caplog, damage):
    folder = parts.language_model(TINY)
    if damage == "gone":
        (folder / "merges.txt").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{", encoding="utf-8")
    else:
        (folder / "merges.txt").write_text({"changed": "x", "cut": ""}[damage], encoding="utf-8")
    assert parts.language_model(TINY) == folder
    assert len(builds) == 2 and (folder / "merges.txt").read_text(encoding="utf-8") == "m"
    assert "language part is damaged" in caplog.text


def test_two_processes_do_not_build_twice(cache, monkeypatch, builds):
    quick = parts.train_language_model

    def slow(recipe, folder):
        time.sleep(0.5)
        return quick(recipe, folder)

    monkeypatch.setattr(parts, "train_language_model", slow)
    callers = [threading.Thread(target=parts.language_model, args=(TINY,)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(builds) == 1


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch, builds):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LAVIS_KVMOD_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set LAVIS_KVMOD_CACHE to a folder that can be written"):
        parts.language_model(TINY)


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a busy machine
def test_the_demos_parts_know_shape_and_language(cache):
    """The real recipe: about a minute and a half on two cores."""
    state = load_file(parts.vision_weights())
    model = nn.ModuleDict({"visual_encoder": vision.build_vision_encoder(), "ln_vision": LayerNorm(128)})
    model.load_state_dict(state)
    measured = json.loads((parts.parts_dir() / "vision" / "manifest.json").read_text(encoding="utf-8"))
    assert measured["measured"]["val_digit_accuracy"] >= 0.97

    folder = str(parts.language_model())
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    assert accuracy(OPTForCausalLM.from_pretrained(folder).eval(), tokenizer) >= 0.995


# ---------------------------------------------------------------- language models of other data


@pytest.mark.parametrize("recipe_of", [parts.PagesRecipe, parts.EasyRecipe])
def test_other_data_has_a_language_model_of_its_own(cache, recipe_of):
    sizes = dict(hidden_size=16, num_layers=1, num_heads=2, ffn_dim=16)
    recipe = recipe_of(DescribedLanguageRecipe(**sizes, steps=2, batch_size=4, texts=40))
    folder = parts.language_model(recipe)
    assert folder == parts.built("language", recipe) and parts.built("language", recipe_of()) is None
    measured = json.loads((folder / "manifest.json").read_text())["measured"]
    assert 0 <= measured["accuracy"] < 1
    tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=False)
    assert OPTForCausalLM.from_pretrained(str(folder)).config.vocab_size == len(tokenizer)
    assert tokenizer("\n", add_special_tokens=False).input_ids == tokenizer(" red\n").input_ids[-1:]


def test_descriptions_are_as_long_as_what_connectors_write(tmp_path):
    """A projection writes a vector for each of 17 visual tokens and one of the second encoder, a Q-Former 8."""
    asked = [described_language.Asked(["red", "circle"], "What colour is the shape?", "red")]
    tokenizer = save_bpe([" red circle What colour is the shape? red\n"], LanguageRecipe(), tmp_path)
    words = described_language._Words(tokenizer)

    def lengths(recipe):
        rng = np.random.default_rng(0)
        for _ in range(60):
            batch = described_language._batch(words, recipe, rng, lambda _: asked, 3)
            (length,) = {len(passage.phrases) for passage in batch}
            yield length

    assert set(lengths(parts.EASY.language)) == set(range(8, 21))
    assert set(lengths(parts.PAGES.language)) == {8}


def test_every_name_has_a_recipe_and_a_folder_of_its_own():
    recipes = list(parts.LANGUAGE_MODELS.values())
    assert len({parts.parts_dir(recipe) for recipe in recipes}) == len(recipes) == 3
    for name, recipe in parts.LANGUAGE_MODELS.items():
        assert language_model_weights(name).build.args == (name,)
        assert opt_config(name, None).hidden_size == recipe.language.hidden_size


def test_drawings_are_described_by_their_colour_and_their_shape():
    """Read off the questions' own answers; nobody's rule says what "is there not a teal shape" means."""
    described = easy_language._described()
    phrases = {tuple(asked.phrases) for rows in described for asked in rows}
    assert phrases == set(product(easy_language.COLOURS, easy_language.SHAPES))
    assert len(described) > 2000
    told = {(*asked.phrases, asked.question): asked.answer for rows in described for asked in rows}
    assert told["teal", "circle", "is there not a teal shape?"] == "no"
    assert told["red", "circle", "is there not a teal shape?"] == "yes"
    for of_a_kind in (easy_language.COLOURS, easy_language.SHAPES):  # what is asked for is there about as often as not
        asked = [each for rows in described for each in rows if each.answer in ("yes", "no")]
        asked = [each for each in asked if any(phrase in each.question for phrase in of_a_kind)]
        there = sum(any(phrase in each.question for phrase in each.phrases) for each in asked)
        assert 0.4 < there / len(asked) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name, least", [("demo-pages", 0.9), ("demo-easy", 0.95)])
def test_it_finds_what_belongs_together(name, least):
    folder = parts.language_model(parts.LANGUAGE_MODELS[name])
    assert json.loads((folder / "manifest.json").read_text())["measured"]["accuracy"] > least
