from mt.evaluate import sentences


def test_samples_are_spread_over_the_split():
  columns = [[f'{name}{i}' for i in range(100)] for name in 'srba']
  text = sentences.samples(*columns)
  blocks = text.split('\n\n')
  assert len(blocks) == 8
  assert blocks[0].split() == (
    ['source', 's0', 'reference', 'r0', 'before', 'b0', 'after', 'a0']
  )
  assert 's99' in blocks[-1] and 's50' not in blocks[-1]
  # Fewer sentences than asked for: each once.
  text = sentences.samples(*(c[:3] for c in columns))
  assert text.count('source') == 3
