"""The gallery: prompts of a test set with their images in predicted and in human order, and the thoughts behind it."""

import pyarrow as pa

GALLERY_ROLLOUT = pa.struct(
    [
        ("k", pa.int32()),
        ("text", pa.string()),
        ("answer_probabilities", pa.list_(pa.float64())),  # over the answers in ascending order
        ("soft", pa.float64()),  # score of this image by this rollout alone
        ("sampled_answer", pa.int8()),  # null: none, or not a valid one
        ("forced", pa.bool_()),  # the engine closed the thinking
        ("second", pa.bool_()),  # pairs: this image was shown second; null: it was shown alone
    ]
)

GALLERY = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),  # test set
        pa.field("track", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("k", pa.int32(), nullable=False),  # rollouts averaged
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # WebP, at most LONGEST_SIDE
        pa.field("width", pa.int32(), nullable=False),  # of `image`
        pa.field("height", pa.int32(), nullable=False),
        pa.field("anchor", pa.bool_(), nullable=False),  # pairs: the image that the others were compared with
        pa.field("human_rank", pa.float64()),  # 1 = best of the images that are here, ties share
        pa.field("human_rating", pa.float64()),  # 1 to 7
        pa.field("predicted_rank", pa.int32(), nullable=False),  # 1 = best, ties share
        pa.field("score", pa.float64(), nullable=False),  # soft, mean over the k rollouts
        pa.field("score_se", pa.float64()),  # null: an anchor, or fewer than two rollouts
        pa.field("pairs", pa.int32(), nullable=False),  # strictly ranked human pairs that contain this image
        pa.field("pairs_right", pa.float64(), nullable=False),  # of these ordered right, a tie counting half
        pa.field("right", pa.bool_()),  # more than half of its pairs are; null: it has none
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("rollouts", pa.list_(GALLERY_ROLLOUT), nullable=False),  # none: an anchor
    ]
)
