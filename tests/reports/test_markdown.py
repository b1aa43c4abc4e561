from lavis_kvmod.reports.markdown import escape, table


def test_nothing_in_a_text_is_markup():
    assert escape("<script>x</script> & more") == "&lt;script&gt;x&lt;/script&gt; &amp; more"
    text = "| *b* _em_ `c` [a](b) ![i](j)\n# head \\ ~~s~~"
    assert escape(text) == r"\| \*b\* \_em\_ \`c\` \[a\]\(b\) \!\[i\]\(j\) \# head \\ \~\~s\~\~"
    assert escape("blip2_opt_kvmod 3.5") == "blip2_opt_kvmod 3.5"


def test_long_texts_are_cut():
    assert escape("word " * 100, longest=10) == "word word…"


def test_table():
    assert table(["a", "b"], [["1", "2"]], right=[1]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
