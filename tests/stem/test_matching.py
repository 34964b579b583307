"""Text-image matching against explicit sums over AttnGAN's equations 7 to 13."""

import math
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from mirror_modules import ImageFeatures, MatchingLoss, TextFeatures
from mirror_modules.functional import matching_loss, word_region_similarity
from mirror_modules.stem import contrastive_terms, image_sentence_similarity, matching, word_region_attention

I, J, R, L, D = 2, 3, 7, 5, 11  # different primes: a swapped axis cannot pass
B = 3
GAMMAS = {"gamma_attention": 4.0, "gamma_word": 5.0}


def mask_of(*real_words, length=L):
    return torch.arange(length) < torch.tensor(real_words).unsqueeze(1)


def cosine(a, b):
    product_of_lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b)) / product_of_lengths


def attention_by_loops(regions, words, gamma_attention):
    """Attention of one caption of real words (L lists of D) over one image (R lists of D): L lists of R shares."""
    scores = [[math.exp(sum(x * y for x, y in zip(word, region))) for region in regions] for word in words]
    columns = [sum(row[r] for row in scores) for r in range(len(regions))]
    sharp = [[math.exp(gamma_attention * row[r] / columns[r]) for r in range(len(regions))] for row in scores]
    return [[value / sum(row) for value in row] for row in sharp]


def similarity_by_loops(regions, words, gamma_attention, gamma_word):
    total = 0.0
    for word, shares in zip(words, attention_by_loops(regions, words, gamma_attention)):
        context = [sum(share * region[d] for share, region in zip(shares, regions)) for d in range(len(word))]
        total += math.exp(gamma_word * cosine(context, word))
    return math.log(total)


def similarities_by_loops(regions, words, mask, gamma_attention=4.0, gamma_word=5.0):
    table = torch.zeros(len(regions), len(words))
    for i, j in product(range(len(regions)), range(len(words))):
        real = [word for word, is_real in zip(words[j].tolist(), mask[j].tolist()) if is_real]
        table[i, j] = similarity_by_loops(regions[i].tolist(), real, gamma_attention, gamma_word)
    return table


def cross_entropy_by_loops(logits, classes):
    """Mean of -log softmax on the diagonal; other pairs of the same class are not negatives."""
    total = 0.0
    for i, row in enumerate(logits):
        candidates = [math.exp(x) for j, x in enumerate(row) if j == i or classes is None or classes[i] != classes[j]]
        total += math.log(sum(candidates)) - row[i]
    return total / len(logits)


def draw_pairs(dtype=torch.float32):
    image = ImageFeatures(torch.randn(B, R, D, dtype=dtype), torch.randn(B, D, dtype=dtype))
    return image, TextFeatures(torch.randn(B, L, D, dtype=dtype), torch.randn(B, D, dtype=dtype))


@pytest.mark.parametrize("gammas", [(4.0, 5.0), (5.0, 1.0)])
@pytest.mark.parametrize("real_words", [(5, 5, 5), (5, 2, 1)])
def test_similarity_matches_the_loops(real_words, gammas):
    regions, words, mask = torch.randn(I, R, D), torch.randn(J, L, D), mask_of(*real_words)
    values = word_region_similarity(regions, words, mask, gamma_attention=gammas[0], gamma_word=gammas[1])
    assert_close(values, similarities_by_loops(regions, words, mask, *gammas), atol=1e-4, rtol=1e-5)


def test_attention_matches_the_loops():
    regions, words, mask = torch.randn(I, R, D), torch.randn(J, L, D), mask_of(5, 2, 1)
    shares = word_region_attention(regions, words, mask)
    assert shares.shape == (I, J, L, R)
    for i, j in product(range(I), range(J)):
        length = int(mask[j].sum())
        expected = attention_by_loops(regions[i].tolist(), words[j, :length].tolist(), 4.0)
        assert_close(shares[i, j, :length], torch.tensor(expected))


@pytest.mark.parametrize("function", [word_region_similarity, word_region_attention])
def test_without_a_mask_all_words_are_real(function):
    regions, words = torch.randn(I, R, D), torch.randn(J, L, D)
    assert_close(function(regions, words), function(regions, words, mask_of(5, 5, 5)))


def test_gradients_of_similarity():
    regions = torch.randn(I, 3, 2, dtype=torch.float64, requires_grad=True)
    words = torch.randn(J, 4, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(word_region_similarity, (regions, words))
    assert gradcheck(lambda *args: word_region_similarity(*args, mask_of(4, 2, 1, length=4)), (regions, words))


@pytest.mark.parametrize("elements", [2**21, 1])
@pytest.mark.parametrize("garbage", [0.0, 1.0, 1e30, float("inf"), float("nan")])
def test_padding_has_no_influence(monkeypatch, garbage, elements):
    monkeypatch.setattr(matching, "ELEMENTS_ON_A_CPU", elements)
    regions, words = torch.randn(I, R, D, requires_grad=True), torch.randn(J, L, D, requires_grad=True)
    padded_regions = regions.detach().clone().requires_grad_()
    padded_words = torch.cat((words.detach(), garbage * torch.randn(J, 2, D)), dim=1).requires_grad_()
    mask, padded_mask = mask_of(5, 2, 1), mask_of(5, 2, 1, length=L + 2)
    grad = torch.randn(I, J)

    similarity = word_region_similarity(regions, words, mask)
    padded = word_region_similarity(padded_regions, padded_words, padded_mask)
    similarity.backward(grad)
    padded.backward(grad)

    assert_close(padded, similarity)
    assert_close((padded_regions.grad, padded_words.grad[:, :L]), (regions.grad, words.grad))
    assert (padded_words.grad[~padded_mask] == 0).all()


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_padding_has_no_influence_on_the_attention(garbage):
    regions, words, mask = torch.randn(I, R, D), torch.randn(J, L, D), mask_of(5, 2, 1)
    results = []
    for each in (words, words.masked_fill(~mask.unsqueeze(2), garbage)):
        leaves = regions.clone().requires_grad_(), each.clone().requires_grad_()
        shares = word_region_attention(*leaves, mask)
        results.append((shares, *torch.autograd.grad(shares.square().sum(), leaves)))
    assert_close(results[1], results[0], atol=0, rtol=0)


# With 17 features, the largest scores are 17, 4,352 and 1,062,500; float16 ends at 65,504.
@pytest.mark.parametrize("largest", [1, 16, 250])
@pytest.mark.parametrize("garbage", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_double_precision_for_scores_of_any_size(dtype, garbage, largest):
    # Scores of integers are exact in float32.
    drawn, mask = [torch.randint(-largest, largest + 1, (n, m, 17)) for n, m in ((I, R), (J, L))], mask_of(5, 2, 1)
    gradient = torch.randn(I, J)

    def everything(dtype):
        regions, words = (tensor.to(dtype) for tensor in drawn)
        words[~mask] = garbage
        leaves = regions.requires_grad_(), words.requires_grad_()
        similarity = word_region_similarity(*leaves, mask)
        gradients = torch.autograd.grad(similarity, leaves, gradient.to(similarity))
        return [similarity, word_region_attention(*leaves, mask), *gradients]

    for result, reference in zip(everything(dtype), everything(torch.float64), strict=True):
        # Two roundings, of the attention and of the context or the gradient.
        atol = 2 * torch.finfo(dtype).eps * float(reference.detach().abs().max())
        assert_close(result.double(), reference, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_the_scores(dtype):
    regions, words = (torch.randint(-250, 251, (n, m, 17)).float() for n, m in ((I, R), (J, L)))
    with torch.autocast("cpu", dtype=dtype):
        shares = word_region_attention(regions, words, mask_of(5, 2, 1))
        similarity = word_region_similarity(regions, words, mask_of(5, 2, 1))
    assert_close(shares, word_region_attention(regions, words, mask_of(5, 2, 1)))
    expected = word_region_similarity(regions, words, mask_of(5, 2, 1))
    assert_close(similarity, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * float(expected.abs().max()))


def test_a_pair_alone_equals_the_same_pair_in_a_batch():
    regions, words, mask = torch.randn(I, R, D), torch.randn(J, L, D), mask_of(5, 2, 1)
    together = word_region_similarity(regions, words, mask)
    for i, j in product(range(I), range(J)):
        alone = word_region_similarity(regions[i : i + 1], words[j : j + 1, mask[j]])
        assert_close(alone, together[i : i + 1, j : j + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("elements", [1, 2 * R * L, J * R * L])
def test_tiles_of_captions_and_images_change_nothing(monkeypatch, elements):
    inputs, mask = (
        (torch.randn(I, R, D, requires_grad=True), torch.randn(J, L, D, requires_grad=True)),
        mask_of(5, 2, 1),
    )
    results = []
    for per_tile in (2**20, elements):
        monkeypatch.setattr(matching, "ELEMENTS_ON_A_CPU", per_tile)
        similarity = word_region_similarity(*inputs, mask)
        gradient = torch.arange(I * J, dtype=torch.float32).view(I, J)
        results.append((similarity, *torch.autograd.grad(similarity, inputs, gradient)))
    assert_close(*results)


def test_gradients_in_tiles_first_and_second(monkeypatch):
    monkeypatch.setattr(matching, "ELEMENTS_ON_A_CPU", 1)
    inputs = [torch.randn(*size, 2, dtype=torch.float64, requires_grad=True) for size in ((I, 3), (J, 4))]

    def similarity(*args):
        return word_region_similarity(*args, mask_of(4, 2, 1, length=4))

    assert gradcheck(similarity, inputs)
    assert gradgradcheck(similarity, inputs)


def test_a_gradient_with_a_graph_is_the_same_gradient(monkeypatch):
    monkeypatch.setattr(matching, "ELEMENTS_ON_A_CPU", 1)
    regions = torch.randn(I, R, D, dtype=torch.float64, requires_grad=True)
    # One input is computed from the other: its gradient must not be counted twice.
    total = word_region_similarity(regions, 2 * regions[:, :L]).square().sum()
    (plain,) = torch.autograd.grad(total, regions, retain_graph=True)
    (with_graph,) = torch.autograd.grad(total, regions, create_graph=True)
    assert_close(with_graph, plain)


def test_the_transforms_of_torch_func(monkeypatch):
    monkeypatch.setattr(matching, "ELEMENTS_ON_A_CPU", 1)
    regions, words, tangent = torch.randn(I, R, D), torch.randn(J, L, D), torch.randn(I, R, D)
    gradient = torch.func.grad(lambda r: word_region_similarity(r, words).sum())(regions)
    along = torch.func.jvp(lambda r: word_region_similarity(r, words).sum(), (regions,), (tangent,))[1]
    assert_close(along, (gradient * tangent).sum())


def test_each_batch_may_have_its_own_mask_in_vmap():
    batches = 2
    regions, words = torch.randn(batches, I, R, D), torch.randn(batches, J, L, D)
    mask = torch.stack((mask_of(5, 2, 1), mask_of(3, 5, 4)))
    leaves = regions.clone().requires_grad_(), words.clone().requires_grad_()
    for function in (word_region_similarity, word_region_attention):

        def total(*inputs, function=function):
            return function(*inputs).square().sum()

        expected = torch.stack([total(*inputs) for inputs in zip(*leaves, mask)])
        assert_close(torch.func.vmap(total)(regions, words, mask), expected)
        gradients = torch.func.vmap(torch.func.grad(total, argnums=(0, 1)))(regions, words, mask)
        assert_close(gradients, torch.autograd.grad(expected.sum(), leaves))


def test_no_attention_map_is_saved_for_many_captions_of_one_image(monkeypatch):
    captions = 41
    monkeypatch.setattr(matching, "ELEMENTS_ON_A_CPU", R * L)
    regions, words = torch.randn(1, R, D, requires_grad=True), torch.randn(captions, L, D, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        word_region_similarity(regions, words)
    assert sum(tensor.numel() for tensor in saved) == R * D + captions * L * (D + 1)


def test_no_attention_map_of_all_pairs_is_saved(monkeypatch):
    """Autograd saves the inputs and their mask for the backward pass, and nothing that grows with the pairs."""
    monkeypatch.setattr(matching, "ELEMENTS_ON_A_CPU", J * R * L)
    regions, words = torch.randn(I, R, D, requires_grad=True), torch.randn(J, L, D, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        word_region_similarity(regions, words, mask_of(5, 2, 1))
    assert sorted(tuple(tensor.shape) for tensor in saved) == sorted([(I, R, D), (J, L, D), (J, L), (J, L, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_stays_in_its_range_when_regions_cancel(dtype):
    # Almost equal words attend evenly to all regions, whose sum is zero: the contexts are nothing but rounding errors.
    regions = torch.randn(31, R, D)
    regions = regions - regions.mean(dim=1, keepdim=True)
    for spread in (0.0, 1e-3):
        words = torch.randn(1, 1, D) + spread * torch.randn(J, L, D)
        similarity = word_region_similarity(regions.to(dtype), words.to(dtype))
        assert (similarity >= -5 - 1e-4).all()
        assert (similarity <= 5 + math.log(L) + 1e-4).all()


def test_matching_words_are_the_most_similar():
    words = torch.nn.functional.normalize(torch.randn(J, L, D), dim=2)
    regions = 20 * words[:, :, :]
    similarity = word_region_similarity(regions, words)
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2]
    assert similarity.argmax(dim=0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("classes", [None, [4, 4, 9], [1, 2, 3], [6, 6, 6]])
def test_loss_matches_the_loops(classes):
    (image, text), mask = draw_pairs(), mask_of(5, 2, 1)
    by_words = (10 * similarities_by_loops(image.regions, text.words, mask)).tolist()
    by_sentence = [[10 * cosine(a, b) for b in text.sentence.tolist()] for a in image.image.tolist()]
    expected = [
        cross_entropy_by_loops(table, classes)
        for logits in (by_words, by_sentence)
        for table in (logits, [list(column) for column in zip(*logits)])
    ]
    terms = matching_loss(image, text, mask, None if classes is None else torch.tensor(classes))
    assert torch.stack(tuple(terms)).tolist() == pytest.approx(expected, abs=1e-4)
    assert terms.total.item() == pytest.approx(sum(expected), abs=1e-3)


def test_gradients_of_the_loss():
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((B, 3, 2), (B, 2), (B, 4, 2), (B, 2))
    ]

    def total(regions, image, words, sentence):
        mask, classes = mask_of(4, 2, 1, length=4), torch.tensor([7, 7, 5])
        return matching_loss(ImageFeatures(regions, image), TextFeatures(words, sentence), mask, classes).total

    assert gradcheck(total, inputs)


def test_padding_does_not_change_the_loss():
    image, text = draw_pairs()
    padded = TextFeatures(torch.cat((text.words, torch.randn(B, 2, D)), dim=1), text.sentence)
    mask, padded_mask = mask_of(5, 2, 1), mask_of(5, 2, 1, length=L + 2)
    assert_close(tuple(matching_loss(image, padded, padded_mask)), tuple(matching_loss(image, text, mask)))


def test_the_loss_of_a_single_pair_is_zero():
    image, text = draw_pairs()
    alone = matching_loss(ImageFeatures(*(x[:1] for x in image)), TextFeatures(*(x[:1] for x in text)))
    assert tuple(alone) == (0, 0, 0, 0)


def test_module_equals_function():
    (image, text), mask, classes = draw_pairs(), mask_of(5, 2, 1), torch.tensor([7, 7, 5])
    gammas = {"gamma_attention": 2.0, "gamma_word": 3.0, "gamma_loss": 4.0}
    expected = matching_loss(image, text, mask, classes, **gammas)
    assert_close(tuple(MatchingLoss(**gammas)(image, text, mask, classes)), tuple(expected))
    assert_close(tuple(MatchingLoss()(image, text)), tuple(matching_loss(image, text)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    image, text = draw_pairs()
    half = ImageFeatures(*(x.to(dtype) for x in image)), TextFeatures(*(x.to(dtype) for x in text))
    terms = matching_loss(*half)
    assert {term.dtype for term in terms} == {torch.float32}
    assert_close(terms.total, matching_loss(image, text).total, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matching_loss(image, text).total.isfinite()


@pytest.mark.parametrize("mask", [None, mask_of(5, 2, 1)])
def test_compiles_into_one_graph(compiled, mask):
    (image, text), classes, module = draw_pairs(), torch.tensor([7, 7, 5]), MatchingLoss()
    image.regions.requires_grad_()
    terms = compiled(module)(image, text, mask, classes)
    assert_close(tuple(terms), tuple(module(image, text, mask, classes)))
    terms.total.backward()
    assert image.regions.grad.abs().sum() > 0


def test_in_a_compiled_graph_a_caption_without_words_matches_no_image(compiled):
    regions, words = torch.randn(I, R, D, requires_grad=True), torch.randn(J, L, D, requires_grad=True)
    similarity = compiled(word_region_similarity)(regions, words, mask_of(5, 0, 2))
    similarity[:, [0, 2]].sum().backward(retain_graph=True)
    expected = words.grad.clone()
    assert (similarity[:, 1] < -1e37).all()
    similarity[:, 1].sum().backward()
    assert (words.grad == expected).all()
    assert regions.grad.isfinite().all()


@pytest.mark.parametrize(
    ("message", "regions", "words", "mask"),
    [
        (
            r"regions must be \(I, R, D\) and words .* but they are \(2, 7, 11\) and \(3, 5, 7\)",
            (I, R, D),
            (J, L, 7),
            None,
        ),
        (r"regions must be \(I, R, D\)", (I, D), (J, L, D), None),
        (r"caption 2 has no real word", (I, R, D), (J, L, D), mask_of(5, 2, 0)),
        (r"word_mask is \(2, 5\) but the captions are \(3, 5\)", (I, R, D), (J, L, D), mask_of(5, 2)),
        (r"captions of length 0", (I, R, D), (J, 0, D), None),
        (r"images have no regions: \(2, 0, 11\)", (I, 0, D), (J, L, D), None),
    ],
)
def test_errors_of_similarity_and_attention(message, regions, words, mask):
    for function in (word_region_similarity, word_region_attention):
        with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
            function(torch.zeros(regions), torch.zeros(words), mask)


@pytest.mark.parametrize("gamma", [float("nan"), float("inf"), "4", None, True, torch.tensor(4.0)])
@pytest.mark.parametrize("name", ["gamma_attention", "gamma_word"])
def test_a_gamma_is_a_finite_number(name, gamma):
    with pytest.raises(ValueError, match=f"word_region_similarity: {name} must be a finite number, but it is "):
        word_region_similarity(torch.zeros(I, R, D), torch.zeros(J, L, D), **{name: gamma})


def test_the_gamma_of_the_loss_is_a_finite_number_or_learned():
    with pytest.raises(ValueError, match="contrastive_terms: gamma_loss must be a finite number, but it is nan"):
        contrastive_terms(torch.zeros(B, B), gamma_loss=float("nan"))
    with pytest.raises(ValueError, match="MatchingLoss: gamma_loss must be a finite number, but it is inf"):
        MatchingLoss(gamma_loss=float("inf"))
    gamma = torch.tensor(3.0, requires_grad=True)
    contrastive_terms(torch.eye(B), gamma_loss=gamma)[0].backward()
    assert gamma.grad < 0


def test_the_gamma_of_the_attention_is_a_finite_number():
    with pytest.raises(ValueError, match="word_region_attention: gamma_attention must be a finite number, but it is "):
        word_region_attention(torch.zeros(I, R, D), torch.zeros(J, L, D), gamma_attention=float("nan"))


def test_image_sentence_similarity_matches_the_loops():
    images, sentences = torch.randn(I, D), torch.randn(J, D)
    expected = [[cosine(image, sentence) for sentence in sentences.tolist()] for image in images.tolist()]
    assert_close(image_sentence_similarity(images, sentences), torch.tensor(expected))
    assert image_sentence_similarity(images.half(), sentences.half()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(image_sentence_similarity(images, sentences), torch.tensor(expected))
    zero = torch.zeros(1, D, dtype=torch.float64)
    assert image_sentence_similarity(zero, sentences).tolist() == [[0.0] * J]


def test_gradients_of_image_sentence_similarity():
    features = [torch.randn(count, D, dtype=torch.float64, requires_grad=True) for count in (I, J)]
    assert gradcheck(image_sentence_similarity, features)


def test_image_sentence_similarity_does_not_save_the_products_of_all_pairs():
    images, sentences = torch.randn(31, 37, requires_grad=True), torch.randn(29, 37)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        image_sentence_similarity(images, sentences)
    assert max(tensor.numel() for tensor in saved) <= 31 * 37


@pytest.mark.parametrize("shapes", [((I, D), (J, 7)), ((I, D), (D,)), ((I, R, D), (J, D))])
def test_errors_of_image_sentence_similarity(shapes):
    with pytest.raises(
        ValueError, match=r"image_sentence_similarity: images must be \(I, D\) and sentences \(J, D\) with the same D"
    ):
        image_sentence_similarity(*map(torch.zeros, shapes))


@pytest.mark.parametrize("classes", [None, [4, 4, 9]])
def test_contrastive_terms_match_the_loops(classes):
    similarity = torch.randn(B, B, dtype=torch.float64)
    terms = contrastive_terms(similarity, None if classes is None else torch.tensor(classes), gamma_loss=3.0)
    expected = [cross_entropy_by_loops((3 * table).tolist(), classes) for table in (similarity, similarity.mT)]
    assert torch.stack(terms).tolist() == pytest.approx(expected)


def test_contrastive_terms_of_half_precision_do_not_overflow():
    similarity = torch.tensor([[9000.0, 1.0], [2.0, 9000.0]])
    terms = contrastive_terms(similarity.half(), gamma_loss=10.0)
    assert {term.dtype for term in terms} == {torch.float32}
    assert_close(terms, contrastive_terms(similarity.half().double(), gamma_loss=10.0), check_dtype=False)


@pytest.mark.parametrize(
    ("message", "similarity", "class_ids"),
    [
        (r"similarity must be \(B, B\), but it is \(2, 3\)", torch.zeros(2, 3), None),
        (r"similarity must be \(B, B\), but it is \(3,\)", torch.zeros(3), None),
        (r"class_ids must be \(3,\), one per pair, but they are \(2,\)", torch.zeros(3, 3), torch.zeros(2)),
        (r"class_ids must be a tensor, but it is a list", torch.zeros(3, 3), [4, 4, 9]),
    ],
)
def test_errors_of_contrastive_terms(message, similarity, class_ids):
    with pytest.raises(ValueError, match="contrastive_terms: " + message):
        contrastive_terms(similarity, class_ids)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"batch sizes disagree \(regions: \(2, 7, 11\), image: \(3, 11\)", {"regions": torch.zeros(2, R, D)}),
        (r"batch sizes disagree .*sentence: \(2, 11\)", {"sentence": torch.zeros(2, D)}),
        (
            r"image and sentence must both be \(B, D\), but they are \(3, 11\) and \(3, 7\)",
            {"sentence": torch.zeros(B, 7)},
        ),
        (r"class_ids must be \(3,\), one per pair, but they are \(2,\)", {"class_ids": torch.zeros(2)}),
        (r"class_ids must be a tensor, but it is a list", {"class_ids": [4, 4, 9]}),
        (r"regions must be \(I, R, D\)", {"regions": torch.tensor(0.0)}),
    ],
)
def test_errors_of_the_loss(message, changed):
    image, text = draw_pairs()
    arguments = {**image._asdict(), **text._asdict(), "class_ids": None} | changed
    with pytest.raises(ValueError, match="matching_loss: " + message):
        MatchingLoss()(
            ImageFeatures(arguments["regions"], arguments["image"]),
            TextFeatures(arguments["words"], arguments["sentence"]),
            class_ids=arguments["class_ids"],
        )


def test_a_kernel_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=r"word_region_similarity: impl='triton' cannot run: .* on 'cpu'"):
        MatchingLoss(impl="triton")(*draw_pairs())
    with pytest.raises(ValueError, match=r"word_region_similarity: impl must be one of"):
        word_region_similarity(torch.zeros(I, R, D), torch.zeros(J, L, D), impl="cuda")
    with pytest.raises(ValueError, match=r"MatchingLoss: impl must be one of"):
        MatchingLoss(impl="cuda")
