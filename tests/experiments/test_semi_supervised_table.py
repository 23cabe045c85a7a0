"""The verdicts of the semi-supervised table, and what its parts do with labels."""

import pytest
import torch

from pyroboost.experiments import parts
from pyroboost.experiments.semi_supervised import SIZES
from pyroboost.experiments.semi_supervised import _labels as choose
from pyroboost.experiments.semi_supervised import _model as build
from pyroboost.experiments.semi_supervised_claims import COLUMNS, PAPER, verdicts
from pyroboost.models import VAE


def papers(**changes):
    """The paper's own accuracies, by column and number of labels, changed where a test says so."""
    found = {
        (column, count): [values[place] - 0.1, values[place] + 0.1]
        for count, values in PAPER.items()
        for place, column in enumerate(COLUMNS)
    }
    for key, value in changes.items():
        models, count = key.split("_labels_")
        found[f"{models[-1]} model{'s' if models[-1] == '2' else ''}", int(count)] = [value, value]
    return found


def test_all_claims_hold_on_the_papers_numbers():
    found = verdicts(papers())
    assert all(one["holds"] for one in found)
    assert len(found) == 7
    assert "95.20 ± 0.10 (2 models, 100 labels)" in found[0]["evidence"]


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"m2_labels_100": 94.0}, {0}),
        ({"m1_labels_100": 89.0, "m2_labels_100": 89.5}, {1, 6}),
        ({"m1_labels_3000": 94.0}, {2, 6}),
        ({"m2_labels_3000": 95.0}, {3}),
        ({"m2_labels_600": 93.0}, {6}),
    ],
)
def test_each_claim_fails_on_accuracies_that_contradict_it(changes, failing):
    found = verdicts(papers(**changes))
    assert {i for i, one in enumerate(found) if not one["holds"]} == failing


@pytest.fixture
def images():
    labels = torch.arange(400) % 10
    bits = (torch.rand(400, 16) < 0.5).float()
    return parts.Images(bits, bits[:50], bits[:60], labels, labels[:60], (4, 4), "made up")


def test_labels_are_drawn_by_the_seed_from_the_images_in_use(images):
    top = SIZES["smoke"].two
    x, y = choose(images, top, 20, seed=3)
    assert len(x) == len(y) == 300
    assert torch.bincount(y[y >= 0]).tolist() == [2] * 10
    assert torch.equal(y[y >= 0], images.labels[:300][y >= 0])
    assert torch.equal(y, choose(images, top, 20, seed=3)[1])
    assert not torch.equal(y, choose(images, top, 20, seed=4)[1])


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_has_its_models_and_its_loss(images, column):
    sizes = SIZES["smoke"]
    vae = VAE(16, sizes.latent, units=4)
    model = build(vae, column, images, sizes, seed=0)
    models, loss = COLUMNS[column]
    assert len(model) == models
    assert (model[0] is vae) == (models == 2)
    assert (model[-1].classification_weight > 0) == loss
    again = build(vae, column, images, sizes, seed=0)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
