"""Generate the conversations that the embedded model is pre-trained on: short ones about clothes, and small talk.

The base model learns to be an assistant that *talks about* garments: it repeats the attributes in a prompt, explains
names, and praises a garment on request. It does not learn what to do with a row of the data set. The fine-tune teaches
that: answer with an advertisement, which has its own order and phrases.
"""

from collections.abc import Callable
from random import Random
from string import ascii_letters

from helpers.assets.advertise import Item, content, feature_table, sample_item
from helpers.assets.wardrobe import GARMENTS, STYLE_KEY, STYLES

Message = dict[str, str]
Exchange = tuple[str, str]

SYSTEM_PROMPTS = ("你是一个乐于助人的助手。", "你在一家服装店工作，请礼貌地回答顾客。", "请用简短的中文回答。")
SYSTEM_SHARE = 0.1

SMALL_TALK: tuple[Exchange, ...] = (
    ("你好", "您好！很高兴见到您，请问有什么可以帮您？"),
    ("您好", "您好！请问您想看看裙子、上衣还是裤子？"),
    ("早上好", "早上好！愿您今天有个好心情。"),
    ("晚上好", "晚上好！今天过得怎么样？"),
    ("再见", "再见！欢迎下次再来。"),
    ("谢谢", "不客气，能帮到您我很开心。"),
    ("谢谢你", "不客气，能帮到您我很开心。"),
    ("你是谁？", "我是一个很小的语言模型，喜欢聊衣服。"),
    ("你叫什么名字？", "我没有名字，叫我小助手就好。"),
    ("你会做什么？", "我可以解释服装的名称，也可以描述颜色、材质和版型。"),
    ("你几岁了？", "我是一个程序，没有年龄。"),
    ("今天天气怎么样？", "我看不到窗外，不过出门前可以带一件外套。"),
    ("下雨了怎么办？", "记得带伞，再穿一双不怕水的鞋。"),
    ("天气很冷", "那就穿一件羽绒服，再围上围巾吧。"),
    ("天气很热", "那就选轻薄透气的衣服，多喝一点水。"),
    ("春天穿什么？", "春天早晚有点凉，可以穿衬衫，再带一件开衫。"),
    ("夏天穿什么？", "夏天适合穿t恤、短裙和短裤，又凉快又方便。"),
    ("秋天穿什么？", "秋天适合穿风衣和卫衣，挡风又好看。"),
    ("冬天穿什么？", "冬天适合穿毛衣和羽绒服，暖和最重要。"),
    ("去面试穿什么？", "可以穿西装和衬衫，看起来稳重又自信。"),
    ("去跑步穿什么？", "可以穿运动裤和t恤，活动起来很方便。"),
    ("去约会穿什么？", "可以穿一条连衣裙，温柔又好看。"),
    ("去旅行穿什么？", "可以穿舒服的t恤和牛仔裤，走路也不累。"),
    ("一年有几个季节？", "一年有春、夏、秋、冬四个季节。"),
    ("一周有几天？", "一周有七天。"),
    ("一年有几个月？", "一年有十二个月。"),
    ("太阳从哪里升起？", "太阳从东方升起。"),
    ("天空是什么颜色？", "晴天的天空是蓝色的。"),
    ("草是什么颜色？", "春天的草是绿色的。"),
    ("雪是什么颜色？", "雪是白色的。"),
    ("夜晚是什么颜色？", "夜晚是黑色的，有星星的时候会亮一点。"),
    ("大的反义词是什么？", "大的反义词是小。"),
    ("长的反义词是什么？", "长的反义词是短。"),
    ("高的反义词是什么？", "高的反义词是低。"),
    ("冷的反义词是什么？", "冷的反义词是热。"),
    ("宽的反义词是什么？", "宽的反义词是窄。"),
    ("红色和白色混合是什么颜色？", "红色和白色混合是粉色。"),
    ("红色和蓝色混合是什么颜色？", "红色和蓝色混合是紫色。"),
    ("黄色和蓝色混合是什么颜色？", "黄色和蓝色混合是绿色。"),
    ("黑色和白色混合是什么颜色？", "黑色和白色混合是灰色。"),
    ("衣服脏了怎么办？", "先看看标签，再用温水轻轻清洗。"),
    ("真丝怎么洗？", "真丝要用冷水手洗，不要用力拧。"),
    ("羊毛怎么洗？", "羊毛要用冷水轻轻洗，平放着晾干。"),
    ("棉怎么洗？", "棉可以放进洗衣机，洗完早点晾干。"),
    ("衣服皱了怎么办？", "可以用熨斗低温熨平，或者挂在浴室里。"),
    ("我个子不高怎么穿？", "可以试试高腰的裤子，看起来腿会更长。"),
    ("我有点胖怎么穿？", "可以试试宽松的版型，舒服又不挑身材。"),
    ("我皮肤黑适合什么颜色？", "可以试试白色和卡其色，看起来很精神。"),
    ("唱首歌吧", "我不会唱歌，不过可以陪您聊聊天。"),
    ("讲个笑话", "一条裤子对另一条裤子说：别走，我们还没有站直呢！"),
    ("我很开心", "太好了！开心的日子适合穿明亮的颜色。"),
    ("我很难过", "别难过，出去走走，换一件喜欢的衣服吧。"),
    ("我累了", "辛苦了，坐下来休息一会儿吧。"),
    ("我饿了", "那就先去吃点东西，回来我们再聊。"),
)

CLOSING_QUESTIONS = ("请问需要我做什么呢？", "请问您想了解哪一项？")
UNKNOWN_WORD_ANSWER = "抱歉，我还没有听说过这个词，可以换个说法吗？"

# Share of made-up words among the values that the COPYING tasks repeat: the model cannot guess these, only copy them.
MADE_UP_SHARE = 0.15
# How often a prompt is only a garment's name.
BARE_SHARE = 0.3
# How often a prompt has the notation of a row; otherwise it is what people might type.
ROW_SHARE = 0.5


def _kind(rng: Random) -> tuple[str, str]:
    type_ = rng.choice(list(GARMENTS))
    return type_, rng.choice(list(GARMENTS[type_].kinds))


def _made_up_word(rng: Random) -> str:
    """Combine two characters to a word without meaning, often of characters that the tokenizer spells in bytes."""
    known = [c for question, _ in SMALL_TALK for c in question if c.isalpha()]
    return "".join(rng.choice(known) if rng.random() < 0.7 else _rare_character(rng) for _ in range(2))


def _rare_character(rng: Random) -> str:
    return chr(rng.randint(0x4E00, 0x9FA5))


def _with_made_up_values(item: Item, rng: Random) -> Item:
    attributes = tuple(
        (key, _made_up_word(rng)) if key != item.garment.kind_key and rng.random() < MADE_UP_SHARE else (key, value)
        for key, value in item.attributes
    )
    return Item(item.type, attributes)


def _mention(item: Item, rng: Random) -> str:
    """Write the item as a prompt without a question: in the notation of a row, or as a list of words."""
    if rng.random() < ROW_SHARE:
        return content(item)
    values = [value for key, value in item.attributes if key != item.garment.kind_key]
    if not values:
        return item.kind or rng.choice((item.type, item.name))
    if rng.random() < 0.5:
        return f"{'、'.join(values)}的{item.name}"
    return rng.choice(("*", " ", "，", "、")).join([item.name, *values])


def recital(item: Item, rng: Random) -> Exchange:
    """Answer a prompt that only mentions a garment: repeat its attributes, then ask what to do."""
    if rng.random() < BARE_SHARE:
        type_, kind = _kind(rng)
        item = Item(type_, ((GARMENTS[type_].kind_key, kind),) if rng.random() < 0.9 else ())
    facts = [f"{key}是{value}" for key, value in item.attributes if key != item.garment.kind_key]
    if not facts and item.kind:
        facts = [item.garment.kinds[item.kind].definition]
    listed = f"：{'，'.join(facts)}" if facts else ""
    return _mention(item, rng), f"您说的是一{item.garment.measure}{item.name}{listed}。{rng.choice(CLOSING_QUESTIONS)}"


def lookup(item: Item, rng: Random) -> Exchange:
    """Ask for an attribute of a row by its key; sometimes for one that the row does not have."""
    values = dict(item.attributes)
    keys = [*feature_table(item.garment), STYLE_KEY, item.garment.kind_key]
    key = rng.choice(keys if rng.random() < 0.2 else list(values))
    answer = f"{key}是{values[key]}。" if key in values else f"这里没有提到{key}。"
    return f"{content(item)}，{key}是什么？", answer


def definition(item: Item, rng: Random) -> Exchange:
    """Explain what a kind of garment is, what to wear it with, or how it looks."""
    type_, name = _kind(rng)
    kind = GARMENTS[type_].kinds[name]
    return rng.choice(
        (
            (f"{name}是什么？", f"{name}是{kind.definition}。"),
            (f"介绍一下{name}", f"{name}是{kind.definition}。"),
            (f"{name}怎么搭配？", f"{name}可以这样搭配：{kind.pairing}。"),
            (f"{name}穿起来什么样？", f"{name}穿起来是这样的：{kind.form}。"),
        )
    )


def style(item: Item, rng: Random) -> Exchange:
    """Name the advantage of a style, or describe a garment of that style."""
    name = rng.choice(list(STYLES))
    if rng.random() < 0.5:
        return f"{name}风格怎么样？", f"{name}风格的好处是：{rng.choice(STYLES[name].closing)}。"
    return f"{name}风格的{item.name}怎么说？", f"可以说：一{item.garment.measure}{STYLES[name].adjective}{item.name}。"


def feature(item: Item, rng: Random) -> Exchange:
    """Name the advantage of a feature."""
    table = feature_table(item.garment)
    key = rng.choice(list(table))
    value = rng.choice(list(table[key]))
    return rng.choice((value, f"{value}怎么样？")), f"{value}的好处是：{rng.choice(table[key][value])}。"


def praise(item: Item, rng: Random) -> Exchange:
    """Advertise on request: a list of advantages in random order."""
    if rng.random() < 0.25:
        type_, name = _kind(rng)
        item = Item(type_, ((GARMENTS[type_].kind_key, name),))
    garment = item.garment
    kind = garment.kinds[item.kind] if item.kind else None
    table = feature_table(garment)
    points = [rng.choice(table[key][value]) for key, value in item.features]
    points += (kind.form, kind.pairing) if kind else garment.plain
    points.append(rng.choice(STYLES[item.style].closing) if item.style else garment.closing)
    rng.shuffle(points)
    mention = _mention(item, rng)
    prompt = rng.choice(
        (f"夸一夸{mention}", f"给{mention}写一段广告", f"写一段{mention}的广告", f"{mention}，有什么好处？")
    )
    return prompt, f"推荐您试试这{garment.measure}{item.name}！{'，'.join(points)}！"


def small_talk(item: Item, rng: Random) -> Exchange:
    """Answer a greeting, a question of general knowledge, or a request for advice."""
    return rng.choice(SMALL_TALK)


def unknown_word(item: Item, rng: Random) -> Exchange:
    """Answer a word that the tokenizer can only spell in bytes or letters: admit that it is unknown."""
    length = rng.randint(1, 6)
    if rng.random() < 0.5:
        return "".join(_rare_character(rng) for _ in range(length)), UNKNOWN_WORD_ANSWER
    return "".join(rng.choices(ascii_letters + " ", k=length)), UNKNOWN_WORD_ANSWER


Task = Callable[[Item, Random], Exchange]
TASKS: dict[Task, int] = {
    recital: 40,
    praise: 25,
    lookup: 8,
    definition: 8,
    feature: 8,
    style: 5,
    small_talk: 6,
    unknown_word: 2,
}
COPYING: tuple[Task, ...] = (recital, lookup)
TURN_WEIGHTS = (70, 20, 10)


def sample_conversation(
    rng: Random, held_out: frozenset[str] = frozenset(), *, made_up_words: bool = True
) -> list[Message]:
    """Generate a conversation of one to three exchanges; one conversation in ten has a system prompt.

    Args:
        rng: The source of randomness.
        held_out: Prompts of rows whose items must not occur.
        made_up_words: Let the model also copy words that are not in the data set.

    Returns:
        Messages with ``role`` and ``content``.
    """
    messages: list[Message] = []
    if rng.random() < SYSTEM_SHARE:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for _ in range(rng.choices((1, 2, 3), TURN_WEIGHTS)[0]):
        item = sample_item(rng)
        while not item.features or content(item) in held_out:
            item = sample_item(rng)
        task = rng.choices(list(TASKS), list(TASKS.values()))[0]
        if made_up_words and task in COPYING:
            item = _with_made_up_values(item, rng)
        question, answer = task(item, rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
