package outbox

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mailbridge/internal/mailerr"
)

type metrics struct {
	submitted, duplicates, dead prometheus.Counter
	attempts, lookups           *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, o *Outbox) *metrics {
	m := &metrics{
		submitted:  prometheus.NewCounter(prometheus.CounterOpts{Name: "mailbridge_outbox_submitted_total", Help: "Messages taken."}),
		duplicates: prometheus.NewCounter(prometheus.CounterOpts{Name: "mailbridge_outbox_duplicates_total", Help: "Resubmissions answered with an earlier message."}),
		dead:       prometheus.NewCounter(prometheus.CounterOpts{Name: "mailbridge_outbox_dead_total", Help: "Messages given up."}),
		attempts:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mailbridge_outbox_attempts_total", Help: "Attempts by result: ok or the class of the failure."}, []string{"result"}),
		lookups:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mailbridge_outbox_lookups_total", Help: "Look-ups of unsure outcomes by what they found."}, []string{"finding"}),
	}
	m.attempts.WithLabelValues("ok")
	for _, c := range mailerr.Classes() {
		m.attempts.WithLabelValues(c.String())
	}
	for _, f := range findings {
		m.lookups.WithLabelValues(f)
	}
	if reg != nil {
		reg.MustRegister(m.submitted, m.duplicates, m.dead, m.attempts, m.lookups, &queueCollector{o: o})
	}
	return m
}

// countEvery bounds how often the queue is counted, for counting reads an index.
const countEvery = 10 * time.Second

// queueCollector counts the queue when it is asked.
type queueCollector struct {
	o *Outbox

	mu     sync.Mutex
	at     time.Time
	counts map[State]int
	parked int
}

var (
	messagesDesc = prometheus.NewDesc("mailbridge_outbox_messages", "Messages in the outbox by state.", []string{"state"}, nil)
	parkedDesc   = prometheus.NewDesc("mailbridge_outbox_parked_accounts", "Accounts whose mail waits for somebody or for a limit.", nil, nil)
)

func (c *queueCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- messagesDesc
	ch <- parkedDesc
}

func (c *queueCollector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) > countEvery {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if counts, err := c.o.Queue().Counts(ctx); err == nil {
			c.counts, c.at = counts, time.Now()
		}
		c.o.mu.Lock()
		c.parked = 0
		for _, a := range c.o.accounts {
			if a.park != nil {
				c.parked++
			}
		}
		c.o.mu.Unlock()
	}
	for _, s := range States() {
		ch <- prometheus.MustNewConstMetric(messagesDesc, prometheus.GaugeValue, float64(c.counts[s]), string(s))
	}
	ch <- prometheus.MustNewConstMetric(parkedDesc, prometheus.GaugeValue, float64(c.parked))
}
