"""What the tokenizer is trained on: common English words, Python keywords and the marks of code and JSON."""

_ENGLISH = """
the of and to a in that is was he for it with as his on be at by had not are but from or have an they which one you
were her all she there would their we him been has when who will more no if out so said what up its about into than
them can only other new some could time these two may then do first any my now such like our over man me even most
made after also did many before must through back years where much your way well down should because each just those
people mister how too little state good very make world still own see men work long get here between both life being
under never day same another know while last might us great old year off come since against go came right used take
three states himself few house use during without again place around however home small found thought went say part
once general high upon school every does got united left number course war until always away something fact though
water less public put thing almost hand enough far took head yet government system better set told nothing night end
why called find going look asked later knew point next program city business give group toward young days let room
president side social given present several order national possible rather second face per among form important often
things looked early white case large big need four within felt along children saw best church ever least power
development light seemed family interest want members mind country area others done turned although open god service
certain kind problem began different door thus help sense means whole matter york times law human line above name
example action company hands local show five history whether gave either today act feet across past quite taken
anything seen having death experience body week half word field words car already themselves information tell together
college shall money period held keep sure probably free real seems behind cannot political air question office brought
whose special major heard problems federal became study ago moment result available known street economic boy position
reason change south board individual job society areas west close turn love community true court force full cost seem
wife future age wanted voice department center woman control common policy necessary following front six girl clear
further land run students provide feel party able mother music education university child effect level stood military
town short morning total outside rate figure class art century north usually plan leave therefore evidence top million
sound black strong hard various play says believe surface value soon type mean near modern table peace red road tax
process situation minutes lost personal english women idea gone increase nature month cut living started longer
section finally third secretary private needed expected nor return move story read answer paper space book simple test
model letter server token request batch write learn train cache memory kernel sum list river mountain forest garden
winter summer spring autumn bread coffee bridge stone silver golden window market doctor teacher student engine
machine computer science weather planet ocean island animal horse bird fish tree flower song dance dream travel
journey evening minute hour friend brother sister father daughter village castle king queen
"""

_PYTHON = """
False None True and as assert async await break class continue def del elif else except finally for from global if
import in is lambda nonlocal not or pass raise return try while with yield self print range len int float str list dict
"""

_MARKS = '{ } [ ] " ": ", ( ) (): , . ; = == -> #'

WORDS = _ENGLISH.split()
ENDINGS = ("", "s", "ed", "ing", "er", "ly")
PYTHON = _PYTHON.split()
MARKS = _MARKS.split()
